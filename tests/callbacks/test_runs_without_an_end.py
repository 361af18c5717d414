"""Techniques that place their phases by the length of the run, where the data have no length or the run has no end."""

from typing import Any

import lightning.pytorch as pl
import pytest
from torch.utils.data import DataLoader, IterableDataset

from lightning_grad.callbacks import InfoBatch, NMSparsity
from lightning_grad.functional import is_nm
from lightning_grad.testing import BATCH, BATCHES, loaders, make_classifier, make_data, make_trainer


class Stream(IterableDataset):
    """The samples of the classifier, without a length."""

    def __iter__(self) -> Any:
        data = make_data()
        return iter(data[index] for index in range(len(data)))


class Decays(pl.Callback):
    """Writes down D of every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.seen.append(trainer.callback_metrics["sparsity/decay"].item())


def decays(train: DataLoader, decay: float | None) -> list[float]:
    sparsity, seen = NMSparsity("1:4", include=["hidden"], decay=decay, figure=False), Decays()
    module = make_classifier()
    trainer = make_trainer(callbacks=[sparsity, seen], max_epochs=4, log_every_n_steps=1)
    trainer.fit(module, train)
    assert is_nm(module.hidden.weight, 1, 4)
    return seen.seen


@pytest.mark.parametrize("decay", [None, 0.2])
def test_sparsity_of_data_without_a_length_begins_in_the_second_epoch(decay, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr("lightning_grad.core.callback.rank_zero_info", said.append)
    known, measured = decays(loaders()[0], decay), decays(DataLoader(Stream(), BATCH), decay)
    assert measured[:BATCHES] == [1.0] * BATCHES
    assert measured[BATCHES:] == known[BATCHES:]
    assert measured[-1] == 0.0
    assert len([line for line in said if "waits for the end of the first epoch" in line]) == 1


class Samples(pl.Callback):
    """Writes down how many batches each epoch has, and ends the run after some epochs."""

    def __init__(self, epochs: int) -> None:
        self.epochs, self.batches = epochs, []

    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
        self.batches.append(trainer.fit_loop.batch_idx + 1)
        trainer.should_stop = len(self.batches) == self.epochs


@pytest.mark.parametrize(("total", "whole"), [(None, []), (20, [3, 4]), (100, [])])
def test_infobatch_trains_on_all_samples_at_the_end_that_is_stated(total, whole, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr("lightning_grad.core.callback.rank_zero_info", said.append)
    samples = Samples(5)
    callback = InfoBatch(0.5, prune_until=0.75, total_steps=total)
    make_trainer(callbacks=[callback, samples], max_epochs=-1).fit(make_classifier(), loaders()[0])
    full = [epoch for epoch, batches in enumerate(samples.batches) if batches == BATCHES]
    assert full == [0, *whole]
    assert bool([line for line in said if "Set total_steps=..." in line]) == (total is None)
