"""What a weighted run logs: the step's own loss is the plain one, and both are under ``data/``."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.nn import functional as F

from lightning_grad.callbacks import InfoBatch, LossReweighting
from tests.callbacks.data_pruning.test_data_pruning import Classifier, train


class OneCall(Classifier):
    """Logs its loss, as all of these."""

    def losses(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1], reduction="none")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss


class Terms(OneCall):
    learning_rate = 0.01

    def losses(self, batch: Any) -> Tensor:
        logits = self(batch[0])
        return F.cross_entropy(logits, batch[1], reduction="none") + 0.3 * logits.square().mean(1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.losses(batch).mean() + 0.01 * sum(p.square().sum() for p in self.parameters())
        self.log("loss", loss)
        return loss


def losses_of(module: Any, batch: Any) -> Tensor:
    return module.losses(batch)


def callback_of(kind: str, **more: Any) -> Any:
    if kind == "info":
        return InfoBatch(0.5, prune_until=1.0, **more)
    return LossReweighting(temperature=0.5, start_temperature=0.5, warmup_fraction=0.0, **more)


@pytest.mark.parametrize(
    ("module", "more"),
    [
        (OneCall, {}),
        (OneCall, {"loss_index": 0}),
        (Terms, {}),
        (OneCall, {"loss_fn": losses_of}),
        (Terms, {"loss_fn": losses_of}),
    ],
)
@pytest.mark.parametrize("kind", ["info", "reweighting"])
def test_both_losses_are_logged_and_the_step_keeps_its_own(kind: str, module: Any, more: Any, tmp_path: Path) -> None:
    callback, seen = callback_of(kind, **more), []
    weigh = callback._weigh

    def spy(losses: Any) -> Tensor | None:
        weights = weigh(losses)
        seen.append((losses.losses.detach(), weights))
        return weights

    callback._weigh = spy
    logged = train(
        callback, module(normalizes=False), epochs=3, logger=CSVLogger(tmp_path), log_every_n_steps=1
    ).trainer.logged_metrics
    losses, weights = seen[-1]
    constant = float(logged["loss"]) - float(losses.mean())  # belongs to no sample
    assert (constant > 1e-3) == (module is Terms)
    torch.testing.assert_close(logged["data/loss"], logged["loss"])
    expected = float((weights * losses).mean()) + constant
    assert float(logged["data/weighted_loss"]) == pytest.approx(expected, rel=1e-4)
    assert abs(float(logged["data/weighted_loss"]) - float(logged["data/loss"])) > 1e-4


@pytest.mark.parametrize("kind", ["info", "reweighting"])
def test_a_neutral_run_logs_neither(kind: str, tmp_path: Path) -> None:
    callback = InfoBatch(0.0) if kind == "info" else LossReweighting(temperature=float("inf"))
    run = train(callback, OneCall(), epochs=3, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    assert not {"data/loss", "data/weighted_loss"} & set(run.trainer.logged_metrics)
