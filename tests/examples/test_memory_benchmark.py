"""The benchmark of memory sees what a callback holds, each storage once. Nothing about how much the techniques hold."""

import gc

import lightning.pytorch as pl
import pytest
import torch

from benchmarks import memory
from benchmarks.memory import bytes_of_tensors, bytes_of_weights, callback_rows, memory_of, rows_of
from benchmarks.rows import HELD, MOST, PEAK
from lightning_grad.cli.check.memory import can_fork

pytestmark = pytest.mark.skipif(not can_fork(), reason="the script needs a system that can fork")


class Hoard(pl.Callback):
    """Holds a copy of the weights, and another one after every log step."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.copies = [parameter.detach().clone() for parameter in pl_module.parameters()]
        self.views = [copy[:1] for copy in self.copies]
        self.more = [copy.clone() for copy in self.copies] if trainer.global_step % memory.LOG_EVERY == 0 else []


@pytest.fixture
def _small(monkeypatch):
    for name, value in {"LAYERS": 1, "WIDTH": 256, "CHANNELS": 1, "BATCH": 2}.items():
        monkeypatch.setattr(memory, name, value)
    fit = memory.watched_fit

    def watched_fit(*arguments, **more):
        gc.freeze()  # in the forked process: what it has from the tests before is no part of the fit
        return fit(*arguments, **more)

    monkeypatch.setattr(memory, "watched_fit", watched_fit)


@pytest.mark.usefixtures("_small")
def test_copies_of_the_weights_are_counted_once_and_raise_the_peak():
    found = {name: memory_of(build) for name, build in {"plain": list, "hoard": lambda: [Hoard()]}.items()}
    (row,) = rows_of(found, {"hoard": "plain"})
    assert row.columns[HELD] == pytest.approx(1, abs=1e-3)
    assert row.columns[MOST] == pytest.approx(2, abs=1e-3)
    assert found["plain"].held >= 4 * bytes_of_weights()  # weights, gradients, two moments
    assert row.columns[PEAK] > 0.5


@pytest.mark.usefixtures("_small")
def test_a_technique_is_measured_at_its_trial_setting():
    again, sparse = callback_rows(["NMSparsity"])
    assert again.name == "plain, again"
    assert again.columns[HELD] == pytest.approx(0, abs=1e-3)
    assert sparse.columns[HELD] > 0.3


def test_gradients_that_python_has_not_seen_are_counted():
    weight = torch.ones(1000, requires_grad=True)
    before = bytes_of_tensors()
    (2 * weight).sum().backward()
    assert bytes_of_tensors() - before == 4000


def test_a_fit_that_fails_is_an_error():
    def fail():
        raise SystemExit

    with pytest.raises(RuntimeError, match="did not succeed"):
        memory_of(fail)
