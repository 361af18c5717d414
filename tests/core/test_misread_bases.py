"""What an author easily gets wrong in a technique of their own is refused, in words that name the technique."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from lightning_grad.core import (
    GradCallback,
    GradientConditioner,
    HeldRates,
    OptimizerCallback,
    ProbeCallback,
    Reading,
    Role,
    Stage,
    SubsetCallback,
    ViewedWeight,
    WeightCallback,
)
from lightning_grad.testing import fit


class Chooser(SubsetCallback):
    kept_by_author: ClassVar[Any] = None

    def choose_samples(self, trainer: Any, pl_module: Any) -> Tensor | None:
        return type(self).kept_by_author  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        (torch.arange(48) % 2 == 0, r"got torch.bool of shape \(48,\)"),
        ([0, 1, 2], "got list"),
        (torch.tensor([], dtype=torch.long), r"got torch.int64 of shape \(0,\)"),
        (torch.tensor([[0, 1]]), r"got torch.int64 of shape \(1, 2\)"),
    ],
)
def test_a_choice_that_is_no_list_of_indices(kept: Any, words: str) -> None:
    """A mask trained on the samples 0 and 1, each many times."""
    technique = type("Mask", (Chooser,), {"kept_by_author": kept})()
    with pytest.raises(TypeError, match=rf"Mask.choose_samples must return a tensor \(n,\).*{words}"):
        fit([technique])


def test_rates_with_another_number_of_factors_than_groups() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    with pytest.raises(ValueError, match="one for each of the optimizer's 1 parameter groups; got 2 factors"):
        HeldRates(optimizer).multiply([0.5, 0.5])
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert not [name for name in vars(optimizer) if "lightning_grad" in name]


def test_rates_of_a_technique_with_too_few_factors_end_the_fit() -> None:
    class Two(OptimizerCallback):
        def before_step(self, index: int, optimizer: Any) -> None:
            self.multiply_rates(index, [0.5, 0.5])

    with pytest.raises(ValueError, match="factor must be one number or one for each"):
        fit([Two()])


class Looker(ProbeCallback):
    namespace: ClassVar[str] = "looker"

    def probe(self, look: Any) -> Reading:
        return Reading({"epoch": 1.0})


def test_a_scalar_named_like_a_column_of_the_record() -> None:
    with pytest.raises(TypeError, match="Looker: no scalar can be named 'epoch'"):
        fit([Looker()])


class Silent(GradientConditioner):
    namespace: ClassVar[str] = "silent"
    role: ClassVar[Role] = "clip"

    def condition(self, step: Any) -> Any:
        return None


def test_a_rule_that_returns_nothing() -> None:
    with pytest.raises(TypeError, match=r"Silent.condition must return a mapping of the values to log.*Return \{\}"):
        fit([Silent()])


@pytest.mark.parametrize(("attributes", "got"), [({"role": "sign"}, "'sign'"), ({}, "none")])
def test_a_rule_without_a_phase(attributes: Any, got: str) -> None:
    with pytest.raises(TypeError, match=f"attribute role of Rule must be one of .*'guard', 'center'.*got {got}"):
        type("Rule", (GradientConditioner,), attributes)()


class Nothing(ViewedWeight):
    pass


class Viewer(WeightCallback[ViewedWeight]):
    namespace: ClassVar[str] = "viewer"
    stage: ClassVar[Stage] = Stage.NOISE
    effect: ClassVar[str] = "odd"

    def view(self, found: Any) -> Any:
        return None


def test_a_view_that_is_none() -> None:
    with pytest.raises(TypeError, match=r"Viewer.view must return a ViewedWeight, or the reason why .* got NoneType"):
        fit([Viewer(["*"])])


@pytest.mark.parametrize(
    ("base", "attributes", "words"),
    [
        (GradientConditioner, {"role": "clip"}, r"condition\(step\)"),
        (SubsetCallback, {}, r"choose_samples\(trainer, pl_module\)"),
        (ProbeCallback, {"namespace": "p"}, r"probe\(look\)"),
        (WeightCallback, {"effect": "odd", "stage": Stage.NOISE}, r"view\(found\)"),
    ],
)
def test_a_technique_without_its_method(base: type, attributes: Any, words: str) -> None:
    with pytest.raises(NotImplementedError, match=f"Bare must define {words}"):
        fit([type("Bare", (base,), attributes)()])


def test_an_argument_stored_under_another_name() -> None:
    class Hidden(GradCallback):
        def __init__(self, factor: float = 1.0, name: str | None = None) -> None:
            super().__init__(name)
            self._factor = factor

    with pytest.raises(TypeError, match=r"Hidden has no attribute 'factor'. Store every constructor argument"):
        fit([Hidden()])


def test_a_fixed_setting_that_is_no_argument() -> None:
    """Misspelled, it fixed nothing."""

    class Fixed(GradCallback):
        fixed_settings: ClassVar[Any] = {"windows": "its history has that length"}

        def __init__(self, window: int = 1, name: str | None = None) -> None:
            super().__init__(name)
            self.window = window

    with pytest.raises(TypeError, match=r"Fixed.fixed_settings must name .*\(window, name\); got 'windows'"):
        fit([Fixed()])
