"""Samples that are learnt late come more often from then on, and schedules end where they should."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_grad.callbacks import DataPruning, RepeatedRandomSubset, UniformLearning
from lightning_grad.functional import uniform_learning_repeats
from tests.callbacks.data_pruning.test_data_pruning import Classifier, Fixed, Manual, Tiny, make_data, train

SAMPLES = 24


def run(callback: Any, *args: Any, **arguments: Any) -> Any:
    return train(callback, *args, **{"epochs": 4, "dataset": make_data(SAMPLES), **arguments})


def repeats_by_hand(found: Any, epoch: int) -> set[int]:
    x, y, _ = make_data(SAMPLES).tensors
    logits = found.watch.module_at(epoch, found.module)(x).detach()
    losses = logits.logsumexp(1) - logits[torch.arange(SAMPLES), y]
    return set(uniform_learning_repeats(logits.double(), losses.double(), y, 0).tolist())


@pytest.mark.parametrize("repeats", [1, 2])
def test_what_is_learnt_late_comes_more_often(repeats: int) -> None:
    found = run(UniformLearning(epoch=2, repeats=repeats), Classifier(normalizes=False), batch_size=1)
    late = repeats_by_hand(found, 2)
    assert 3 <= len(late) < SAMPLES
    for number, epoch in enumerate(found.watch.epochs):
        often = Counter(epoch)
        for index in range(SAMPLES):
            assert often[index] == (1 + repeats if number >= 2 and index in late else 1)
    share = found.trainer.callback_metrics["data/kept_share"]
    torch.testing.assert_close(share, torch.tensor(1 + repeats * len(late) / SAMPLES))


def test_nothing_is_repeated_by_repeats_0() -> None:
    for epoch in run(UniformLearning(epoch=1, repeats=0)).watch.epochs:
        assert sorted(epoch) == list(range(SAMPLES))


def test_no_batch_of_one_is_left_over() -> None:
    late = repeats_by_hand(run(UniformLearning(epoch=2), Fixed()), 2)
    size = SAMPLES + len(late)
    found = run(UniformLearning(epoch=2), Fixed(), batch_size=size - 1)
    for epoch in found.watch.epochs[2:]:
        often = Counter(epoch)
        assert len(epoch) == size - 1
        assert set(often) == set(range(SAMPLES))
        assert {index for index in often if often[index] == 2} < late


class Scheduled(Classifier):
    """Its schedule is made for the steps of all epochs of the whole set."""

    steps = 16

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@pytest.mark.parametrize(
    "callback",
    [
        UniformLearning(epoch=1),
        UniformLearning(epoch=2, repeats=3),
        DataPruning(0.5, epoch=1),
        DataPruning(0.5, epoch=1, budget="steps"),
        RepeatedRandomSubset(0.6),
    ],
    ids=lambda callback: type(callback).__name__,
)
def test_schedules_end_where_they_should(callback: Any) -> None:
    found = run(callback, Scheduled(), batch_size=6)
    (config,) = found.trainer.lr_scheduler_configs
    assert config.scheduler.last_epoch == 16
    assert found.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)


def test_a_resumed_run_repeats_the_same_samples(tmp_path: Path) -> None:
    whole = run(UniformLearning(epoch=1))
    run(UniformLearning(epoch=1), epochs=2).trainer.save_checkpoint(tmp_path / "run.ckpt")
    resumed = run(UniformLearning(epoch=1), ckpt=tmp_path / "run.ckpt")
    expected = [sorted(epoch) for epoch in whole.watch.epochs[2:]]
    assert [sorted(epoch) for epoch in resumed.watch.epochs] == expected
    assert len(expected[0]) > SAMPLES


# What cannot work.


def test_a_loss_without_classes_is_refused() -> None:
    dataset = TensorDataset(torch.zeros(8, 2), torch.zeros(8, 3))
    with pytest.raises(ValueError, match=r"needs logits \(B, C\) and one class per sample"):
        run(UniformLearning(epoch=1), Tiny(nn.Linear(2, 3), F.mse_loss), dataset=dataset)


def test_an_epoch_that_never_comes_and_manual_optimization_are_refused() -> None:
    with pytest.raises(ValueError, match=r"would cluster after 8 epochs.*max_epochs=4"):
        run(UniformLearning())
    with pytest.raises(ValueError, match="UniformLearning does not work with manual optimization"):
        run(UniformLearning(epoch=1), Manual())


def test_two_that_choose_are_refused() -> None:
    with pytest.raises(ValueError, match="would both choose the training samples"):
        run(UniformLearning(epoch=1), more=[RepeatedRandomSubset()])
