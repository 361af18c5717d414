"""Claims about fine-tuning: all arms of a seed start from the same pretrained model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from studies import pretrained
from studies.arms import PLAIN, Arm
from studies.claim import Run
from studies.common import hush
from studies.pretrained import FromPretrained, of_classes, turned
from studies.sources import files_of
from studies.tasks import TASKS

TINY = {"width": 8, "depth": 1}


def toy(folder: Path, task: str = "images", **settings: Any) -> FromPretrained:
    """Return a claim of two short arms."""
    hush()
    table = {"plain": PLAIN, "adamw": Arm(module={"optimizer": "adamw"} if task == "images" else {"weight_decay": 0.0})}
    given: dict[str, Any] = {
        "table": table,
        "arms": tuple(table),
        "length": 2,
        "before": 2,
        "samples": 200,
        "budget": 1,
    }
    return FromPretrained(
        name="toy", text="", reference="plain", task=task, output=folder, **{**given, **TASKS[task].metric, **settings}
    )


class FirstWeights(Callback):
    """Keeps the weights at the start of the training."""

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.weights = {name: value.clone() for name, value in pl_module.state_dict().items()}


def start(claim: FromPretrained, arm: str, seed: int = 0) -> dict[str, Tensor]:
    """Return the weights from which an arm starts."""
    first = FirstWeights()
    claim.fitted(Run(arm, seed, 1e-3), [first])
    return first.weights


@pytest.fixture(autouse=True)
def no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the models of other tests."""
    monkeypatch.setattr(pretrained, "_WEIGHTS", {})


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Return True if all weights are equal."""
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("task", "settings"), [("images", {}), ("text", {"change": "turned", "model": TINY})])
def test_all_arms_of_a_seed_start_from_the_same_model(task: str, settings: dict[str, Any], tmp_path: Path) -> None:
    claim = toy(tmp_path, task, limit_batches=2, **settings)
    plain, other, seed = start(claim, "plain"), start(claim, "adamw"), start(claim, "plain", 1)
    assert same(plain, claim.pretrained(Run("plain", 0)))
    assert same(plain, other)
    assert not same(plain, seed)


def test_an_arm_does_not_depend_on_whether_it_is_the_one_that_pretrains(tmp_path: Path) -> None:
    claim = toy(tmp_path)
    first, again = (claim.train(Run("plain", 0, 0.01)) for _ in range(2))
    assert {**first.metrics, "cpu_seconds": 0} == {**again.metrics, "cpu_seconds": 0}


def test_claims_with_the_same_pretraining_share_its_models(tmp_path: Path) -> None:
    claim = toy(tmp_path, limit_batches=2)
    weights = claim.pretrained(Run("plain", 0))
    assert replace(claim, length=4).pretrained(Run("adamw", 0)) is weights
    for other in (replace(claim, before=4), replace(claim, change="none"), replace(claim, samples=100)):
        assert other.pretrained(Run("plain", 0)) is not weights


def test_the_pretrained_model_has_learned(tmp_path: Path) -> None:
    claim = toy(tmp_path, before=6, length=1, change="none")
    assert claim.train(Run("plain", 0, 1e-6)).test_accuracy > 0.8
    half = replace(claim, change="classes")  # of the classes
    assert half.train(Run("plain", 0, 1e-6)).test_accuracy < 0.6


def test_the_pretraining_has_half_of_the_classes_and_the_arms_few_samples_of_all(tmp_path: Path) -> None:
    claim = toy(tmp_path)
    source = claim.source(0)
    before, after = claim.pretraining_data(source), claim.tuning_data(source)
    assert set(before.train_set.tensors[1].tolist()) == set(range(5))  # type: ignore[attr-defined]
    assert set(after.train_set.tensors[1].tolist()) == set(range(10))  # type: ignore[attr-defined]
    assert (len(after.train_set), len(after.val_set), len(after.test_set)) == (200, 197, 200)  # type: ignore[arg-type]


def test_images_are_turned_and_text_is_read_backwards(tmp_path: Path) -> None:
    images = toy(tmp_path, change="turned")
    source = images.source(0)
    plain, other = source.test_set.tensors[0], images.tuning_data(source).test_set.tensors[0]
    assert not torch.equal(plain, other)
    assert torch.equal(plain, other.rot90(3, (2, 3)))
    assert torch.equal(images.pretraining_data(source).train_set.tensors[0], source.train_set.tensors[0])  # type: ignore[attr-defined]
    text = toy(tmp_path, "text", change="turned")
    lines = text.source(0)
    (inputs, targets), (window, following) = text.tuning_data(lines).train_set[3], lines.train_set[3]
    whole = [*window.tolist(), following[-1].item()]
    assert [*inputs.tolist(), targets[-1].item()] == whole[::-1]


def test_a_text_has_no_classes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="change must be turned or none for a text"):
        toy(tmp_path, "text").check()
    with pytest.raises(ValueError, match="change must be classes or turned or none; got 'color'"):
        toy(tmp_path, change="color").check()


def test_results_depend_on_the_code_of_the_pretraining_and_name_their_settings(tmp_path: Path) -> None:
    claim = toy(tmp_path)
    assert any(file.endswith("studies/pretrained.py") for file in files_of(claim))
    assert {"change", "before", "samples", "model"} <= set(claim.settings_of("plain"))


def test_of_classes_and_turned_keep_inputs_and_targets_together() -> None:
    inputs, targets = torch.arange(12.0).view(3, 1, 2, 2), torch.tensor([4, 0, 7])
    kept, labels = of_classes((inputs, targets), 5)
    assert labels.tolist() == [4, 0]
    assert torch.equal(kept, inputs[:2])
    rotated, same_targets = turned((inputs, targets))
    assert torch.equal(same_targets, targets)
    assert rotated[0, 0].tolist() == [[1.0, 3.0], [0.0, 2.0]]
