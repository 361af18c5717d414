"""G8: wrong arguments raise in the constructor, a wrong trainer or module before the first batch."""

from typing import Any

import lightning.pytorch as pl
import pytest
from torch.utils.data import DataLoader, IterableDataset

from tests.contract.projects import BATCH, fit, loaders, make_classifier, make_data, make_trainer
from tests.contract.settings import CANONICAL, TECHNIQUES


@pytest.mark.parametrize(
    ("technique", "arguments", "words"),
    [(technique, arguments, words) for technique in TECHNIQUES for arguments, words in technique.wrong],
    ids=str,
)
def test_wrong_arguments_raise_in_the_constructor(technique, arguments, words):
    with pytest.raises(ValueError, match=words):
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


@pytest.mark.parametrize("technique", [t for t in CANONICAL if "include" in t.build().settings], ids=str)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"include": ["encodr.*"]}, "no parameter is named 'encodr"),
        ({"exclude": ["nothing"]}, "no parameter is named 'nothing'"),
        ({"include": ["hidden"], "exclude": ["hidden"]}, "finds no weight|leave none"),
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


@pytest.mark.parametrize("technique", [t for t in CANONICAL if t.name == "NMSparsity"], ids=str)
@pytest.mark.parametrize("arguments", [{"max_epochs": -1}, {"max_epochs": 2}], ids=["no limit", "iterable"])
def test_a_run_without_a_known_end(technique, arguments):
    train = DataLoader(_Endless(), BATCH) if arguments["max_epochs"] == 2 else loaders()[0]
    with pytest.raises(ValueError, match="no known end"):
        make_trainer(callbacks=[_NoBatch(), technique.build()], **arguments).fit(make_classifier(), train)
