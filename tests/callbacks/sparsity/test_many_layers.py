"""NMSparsity on networks of many small layers: what grows with their number, counted and not timed."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_grad
from lightning_grad.callbacks import NMSparsity
from lightning_grad.callbacks.sparsity import _nm_weight
from lightning_grad.functional import nm_mask
from lightning_grad.testing import assert_identical
from tests.callbacks.sparsity.test_nm_sparsity import Regression, data, trainer
from tests.functional.sparsity.test_joined_masks import Computed

PACKAGE = str(Path(lightning_grad.__file__).parent)


def deep(layers: int) -> Regression:
    torch.manual_seed(0)
    return Regression(nn.Sequential(*(nn.Linear(16, 16) for _ in range(layers)), nn.Linear(16, 8)))


def fit(callback: NMSparsity, module: Regression, batches: int = 3) -> Regression:
    trainer(callback, limit_train_batches=batches, limit_val_batches=0).fit(module, data())
    return module


@pytest.mark.parametrize("recipe", ["ste", "mdgf-exponential"])
def test_a_refresh_takes_as_many_operations_for_many_layers_as_for_few(recipe: Any) -> None:
    class Counting(NMSparsity):
        def after_step(self, *args: Any) -> None:
            with Computed() as computed:
                super().after_step(*args)
            counts.append(computed.calls.total())

    def operations(layers: int) -> set[int]:
        counts.clear()
        fit(Counting("2:4", recipe, include=["*"]), deep(layers))
        return set(counts)

    counts: list[int] = []
    assert operations(3) == operations(12)
    assert 5 < max(counts) < 40


def test_masks_are_taken_once_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def record(weights: Any, *args: Any) -> list[Tensor]:
        taken.append(len(weights))
        return original(weights, *args)

    taken: list[int] = []
    original = _nm_weight.nm_masks
    monkeypatch.setattr(_nm_weight, "nm_masks", record)
    fit(NMSparsity("2:4", "ste", include=["*"]), deep(5), batches=2)
    assert taken == [6, 6, 6]  # at the start, and after each of two steps


def test_weights_that_change_as_the_fit_begins_get_masks_of_their_new_values() -> None:
    class Changed(Regression):
        def on_fit_start(self) -> None:
            self.net[0].weight.data.mul_(torch.linspace(0, 1, 16))  # past the version counter

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            dense = self.net[0]._parameters["weight"].detach()
            seen.append(torch.equal(self.net[0].weight, dense * nm_mask(dense, 1, 4)))
            return super().training_step(batch, batch_idx)

    seen: list[bool] = []
    fit(NMSparsity("1:4", "ste", include=["*"]), Changed(deep(2).net))
    assert seen == [True] * 3


def test_joined_masks_train_like_masks_of_each_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    def separate(weights: Any, n: int, m: int, axes: Any, outside: float = 0.0) -> list[Tensor]:
        return [nm_mask(w, n, m, axis).clamp_(min=outside) for w, axis in zip(weights, axes, strict=True)]

    def trained() -> dict[str, Tensor]:
        torch.manual_seed(0)
        convs = [nn.Unflatten(1, (16, 1)), nn.Conv1d(16, 16, 3, padding=1), nn.Conv1d(16, 32, 1), nn.Flatten()]
        net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), *convs, nn.Linear(32, 24), nn.Linear(24, 8))
        patterns = {"net.0": "1:8", "net.6": "4:8", "*": "2:4"}
        callback = NMSparsity(patterns, gradient="masked", include=["*"], dense_fraction=0.1, mask_every_n_steps=2)
        return fit(callback, Regression(net), batches=10).state_dict()

    joined = trained()
    monkeypatch.setattr(_nm_weight, "nm_masks", separate)
    assert_identical(joined, trained())


@pytest.mark.parametrize("include", [None, ["net.*"]])
def test_a_fit_makes_calls_in_proportion_to_its_layers(include: list[str] | None) -> None:
    def calls(layers: int) -> int:
        def count(frame: FrameType, event: str, _: Any) -> None:
            nonlocal found
            found += event == "call" and frame.f_code.co_filename.startswith(PACKAGE)

        found, module = 0, deep(layers)
        before = sys.getprofile()
        sys.setprofile(count)
        try:
            fit(NMSparsity("2:4", "ste", include=include), module)
        finally:
            sys.setprofile(before)
        return found

    small, middle, large = (calls(layers) for layers in (20, 40, 60))
    assert large - middle == pytest.approx(middle - small, rel=0.02)
