"""G8: wrong arguments raise in the constructor, a wrong trainer or module before the first batch."""

import warnings
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
import pytest
from torch.utils.data import DataLoader, IterableDataset

from lightning_grad.core import MonitoredCallback
from lightning_grad.testing import (
    BATCH,
    assert_identical,
    fit,
    loaders,
    make_classifier,
    make_data,
    make_trainer,
    state_of,
)
from tests.cases import cases
from tests.contract.settings import CANONICAL, CHOOSING, TECHNIQUES


@cases(
    ("technique", "arguments", "words"),
    [(technique, arguments, words) for technique in TECHNIQUES for arguments, words in technique.wrong],
)
def test_wrong_arguments_raise_in_the_constructor(technique, arguments, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        type(technique.build())(**arguments)


@pytest.mark.parametrize("technique", CANONICAL, ids=str)
def test_unknown_arguments_are_not_swallowed(technique):
    with pytest.raises(TypeError):
        technique.build(no_such_argument=1)


class _NoBatch(pl.Callback):
    def on_train_batch_start(self, *_: Any) -> None:
        raise AssertionError("a batch was trained before the refusal")


class _LinesBeforeTheFirstBatch(pl.Callback):
    def __init__(self, caplog: Any) -> None:
        self.caplog = caplog
        self.lines: list[str] = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 0:
            self.lines = [record.getMessage() for record in self.caplog.records]


@pytest.mark.parametrize("technique", CANONICAL, ids=str)
def test_a_line_says_what_it_acts_on_before_the_first_batch(technique, caplog):
    caplog.set_level("INFO")
    spy = _LinesBeforeTheFirstBatch(caplog)
    fit([technique.build(), spy], max_epochs=2)
    own = [line for line in spy.lines if line.startswith((technique.name + " ", technique.name + "("))]
    assert own, spy.lines
    assert all(line.endswith(".") and "\n" not in line for line in own)


@pytest.mark.parametrize("technique", CANONICAL, ids=str)
def test_barebones_runs_without_a_warning_that_names_nobody(technique):
    module = make_classifier()
    module.log = lambda *_, **__: None  # of its own it would warn
    callback = technique.build()
    trainer = pl.Trainer(accelerator="cpu", max_epochs=2, barebones=True, callbacks=[callback])
    needs_metrics = isinstance(callback, MonitoredCallback)
    refusal = pytest.raises(ValueError, match="barebones=True") if needs_metrics else nullcontext()
    with warnings.catch_warnings(record=True) as told, refusal:
        warnings.simplefilter("always")
        trainer.fit(module, *loaders())
    assert not [w for w in told if "trying to `self.log" in str(w.message)]


@pytest.mark.parametrize("technique", CHOOSING, ids=str)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"include": ["encodr.*"]}, "no parameter or module is named 'encodr"),
        ({"exclude": ["nothing"]}, "no parameter or module is named 'nothing'"),
        ({"include": ["hidden"], "exclude": ["hidden"]}, "found no (weight|matrix)|excludes all of them"),
    ],
)
def test_names_that_match_nothing(technique, arguments, words):
    with pytest.raises(ValueError, match=words):
        fit([_NoBatch(), technique.build(**arguments)])


@pytest.mark.parametrize("technique", [t for t in CANONICAL if t.name == "NMSparsity"], ids=str)
def test_two_instances_on_one_weight(technique):
    with pytest.raises(ValueError, match="Separate them"):
        fit([_NoBatch(), technique.build(), technique.build(name="again")])


class _Endless(IterableDataset):
    def __iter__(self) -> Any:
        return iter(make_data())


@pytest.mark.parametrize("technique", [t for t in CANONICAL if t.needs_end is not None], ids=str)
@pytest.mark.parametrize(
    "arguments",
    [{"max_epochs": -1}, {"max_time": "00:01:00:00"}, {"max_epochs": 1}],
    ids=["no limit", "time", "iterable"],
)
def test_a_run_without_a_known_end(technique, arguments):
    given = {"max_epochs": None, **arguments}
    train = DataLoader(_Endless(), BATCH) if arguments.get("max_epochs") == 1 else loaders()[0]
    callback = technique.build(**technique.needs_end)
    ways_out = rf"no known end. Set total_steps=... of {technique.name}|^{technique.name} .*the IterableDataset"
    with pytest.raises((ValueError, TypeError), match=ways_out):
        make_trainer(callbacks=[_NoBatch(), callback], **given).fit(make_classifier(), train)


class _Stop(pl.Callback):
    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == 8


_HAVE_A_LENGTH = [t for t in CANONICAL if "total_steps" in t.build().settings]


@pytest.mark.parametrize("technique", [t for t in _HAVE_A_LENGTH if t.needs_end is None], ids=str)
def test_what_need_not_know_the_end_runs_without_one(technique):
    trainer = make_trainer(callbacks=[technique.build(), _Stop()], max_epochs=-1)
    trainer.fit(make_classifier(), loaders()[0])
    assert trainer.global_step == 8


@pytest.mark.filterwarnings("ignore:.*the run stopped at")
@pytest.mark.parametrize("technique", [t for t in CANONICAL if t.needs_end is not None], ids=str)
def test_a_run_whose_end_is_stated_is_the_run_that_has_it(technique):
    """The way out of the refusal gives, bit for bit, the run with that many steps."""
    found = []
    for arguments, stated in (({"max_steps": 8}, {}), ({}, {"total_steps": 8})):
        callback = technique.build(**{**technique.needs_end, **stated})
        trainer = make_trainer(callbacks=[callback, _Stop()], max_epochs=-1, **arguments)
        trainer.fit(make_classifier(), loaders()[0])
        assert trainer.global_step == 8
        found.append(state_of(trainer, trainer.lightning_module))
    assert_identical(*found)
