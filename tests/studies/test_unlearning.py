"""Claims about unlearning: a gap to a model that has never seen the samples to forget."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from studies import pretrained
from studies.claim import Run
from studies.claims import CLAIMS
from studies.common import hush
from studies.unlearning import Unlearned, gap_of


@pytest.fixture(autouse=True)
def no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the models of other tests."""
    monkeypatch.setattr(pretrained, "_WEIGHTS", {})
    hush()


def short(folder: Path, **settings: Any) -> Unlearned:
    """Return the claim with few, short trainings."""
    claim = CLAIMS["unlearning-images"]
    assert isinstance(claim, Unlearned)
    return replace(claim, output=folder, **{"samples": 64, "forgotten": 16, "before": 2, "length": 2, **settings})


class Seen(Callback):
    """Keeps the inputs of all training steps."""

    def __init__(self) -> None:
        self.rows: list[torch.Tensor] = []

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.rows += list(batch[0])


def test_the_retrained_model_has_not_seen_what_the_arms_forget(tmp_path: Path) -> None:
    claim = short(tmp_path)
    source = claim.source(0)
    whole, without = claim.pretraining_data(source), replace(claim, skipped=16).pretraining_data(source)
    tuned = claim.tuning_data(source).train_set
    assert torch.equal(whole.train_set.tensors[0], tuned.tensors[0])
    assert torch.equal(whole.train_set.tensors[0][16:], without.train_set.tensors[0])
    seen = Seen()
    claim.fitted(Run("saliency", 0, 1e-3), [seen])
    assert len(seen.rows) == 2 * 64, "the samples to forget are trained on, too"


def test_the_gap_is_that_of_the_reported_accuracies(tmp_path: Path) -> None:
    claim = short(tmp_path)
    found = claim.train(Run("saliency", 0, 0.03))
    own, other = (
        {name: found.metrics[f"{whose}{name}_accuracy"] for name in ("forget", "retain", "test")}
        for whose in ("", "retrained_")
    )
    assert found.gap == pytest.approx(gap_of(own, other, "test"))
    assert found.steps == 2
    again = claim.train(Run("random labels", 0, 0.03))
    assert again.retrained_test_accuracy == found.retrained_test_accuracy
    assert again.start_gap == found.start_gap


def test_a_model_that_equals_the_retrained_one_has_no_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = short(tmp_path)
    weights = replace(claim, skipped=16).pretrained(Run("saliency", 0))
    monkeypatch.setattr(Unlearned, "pretrained", lambda self, run: weights)
    found = claim.train(Run("saliency", 0, 1e-9))
    assert found.start_gap == 0
    assert found.gap < 0.2, "only the running statistics have moved"
