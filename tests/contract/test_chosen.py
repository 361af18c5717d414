"""Every technique says what it acts on, in words and as a list, from ``on_fit_start`` on; and has a setting to try it."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning_utilities.core import rank_zero

from lightning_grad import callbacks, strategies
from lightning_grad.core import Chosen
from lightning_grad.testing import StopAt, fit, make_classifier, make_data, on_ranks
from tests.contract import settings, strategy_settings
from tests.strategies.fits import train_on_ranks

MADE = [
    (package, name)
    for package in (callbacks, strategies)
    for name in package.__all__
    if not inspect.isabstract(getattr(package, name))
]
KNOWN: dict[str, Callable[[Any], list[str | int]]] = {
    "parameters": lambda trainer: [name for name, _ in trainer.lightning_module.named_parameters()],
    "samples": lambda trainer: list(range(len(make_data()))),
    "optimizers": lambda trainer: [f"optimizers[{i}]" for i in range(len(trainer.optimizers))],
    "learning rates": lambda trainer: ["optimizers[0].param_groups[0]"],
    "layers": lambda trainer: [name for name, _ in trainer.lightning_module.named_modules()],
    "inputs": lambda trainer: ["batch[0]"],
    "losses": lambda trainer: ["training_step"],
    "callbacks": lambda trainer: [type(callback).__name__ for callback in trainer.callbacks],
}


class Asks(pl.Callback):
    """Asks a technique what it acts on, when the fit begins and when it ends."""

    def __init__(self, technique: Any) -> None:
        self.technique = technique
        self.answers: list[Chosen] = []
        self.known: list[str | int] = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.answers.append(self.technique.chosen())

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.answers.append(self.technique.chosen())
        self.known = KNOWN[self.answers[0].kind](trainer)


@pytest.fixture
def lines() -> Any:
    """Collect what is printed."""
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger, level = rank_zero.log, rank_zero.log.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield found
    logger.removeHandler(handler)
    logger.setLevel(level)


def assert_answers(asks: Asks) -> None:
    first, last = asks.answers
    assert first.words == last.words
    assert first.kind == last.kind
    assert last.names, "a technique at its trial setting acts on something"
    assert set(first.names) <= set(last.names) <= set(asks.known)
    assert first.kind == "samples" or len(set(last.names)) == len(last.names)  # samples may be repeated
    if first.kind not in ("samples", "inputs", "layers"):  # which the first batch shows
        assert first.names == last.names


@pytest.mark.parametrize("name", callbacks.__all__)
def test_a_callback_says_what_it_acts_on(name: str, lines: list[str]) -> None:
    cls = getattr(callbacks, name)
    technique = cls(**cls.trial)
    with pytest.raises(RuntimeError, match=rf"{name} has not chosen what it acts on.*chosen\(\) during fit"):
        technique.chosen()
    asks = Asks(technique)
    fit([technique, asks], max_epochs=2)
    assert_answers(asks)
    assert f"{technique.display_name} {asks.answers[0].words}." in lines
    assert " " in asks.answers[0].words
    assert not asks.answers[0].words.endswith(".")
    with pytest.raises(RuntimeError, match="no fit is running"):
        technique.chosen()


def _ask_strategy(name: str) -> tuple[list[Chosen], list[str | int]]:
    cls = getattr(strategies, name)
    strategy = cls(**cls.trial)
    with pytest.raises(RuntimeError, match=rf"{name} chooses what .* when a fit begins"):
        strategy.chosen()
    asks = Asks(strategy)
    module = make_classifier(optimizer="adamw" if name == "OneBitAdamStrategy" else "sgd")
    train_on_ranks(strategy, [asks], module, max_epochs=1)
    return asks.answers, asks.known


@pytest.mark.parametrize("name", [name for package, name in MADE if package is strategies])
def test_a_strategy_says_what_it_compresses_or_exchanges(name: str) -> None:
    for answers, known in on_ranks(2, _ask_strategy, name):
        asks = Asks(None)
        asks.answers, asks.known = answers, known
        assert_answers(asks)
        assert answers[0].words.startswith(
            (f"compresses {len(names := answers[0].names)} of ", f"exchanges {len(names)} ")
        )


def test_after_an_exception_nothing_is_chosen() -> None:
    technique = callbacks.ZClip(**callbacks.ZClip.trial)
    with pytest.raises(RuntimeError, match="on purpose"):
        fit([technique, StopAt(3)])
    with pytest.raises(RuntimeError, match="no fit is running"):
        technique.chosen()


def test_a_group_that_is_added_in_mid_fit_is_named_from_its_first_step_on() -> None:
    class Unfreezes(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                trainer.optimizers[0].add_param_group({"params": list(pl_module.head.parameters())})

    module = make_classifier()
    module.configure_optimizers = lambda: torch.optim.SGD(module.hidden.parameters(), lr=0.1)
    technique = callbacks.NormClipping(**callbacks.NormClipping.trial)
    asks = Asks(technique)
    fit([technique, Unfreezes(), asks], module, max_epochs=2)
    assert asks.answers[0].names == ["hidden.weight", "hidden.bias"]
    assert asks.answers[1].names == ["hidden.weight", "hidden.bias", "head.weight", "head.bias"]
    assert asks.answers[1].words.startswith("acts on 4 parameters")


def test_names_of_samples_are_those_of_the_present_epoch() -> None:
    technique = callbacks.DataPruning(prune=0.5, epoch=1)
    asks = Asks(technique)
    fit([technique, asks], max_epochs=2)
    assert asks.answers[0].names == []
    assert len(asks.answers[1].names) == len(make_data()) // 2


# The setting.


@pytest.mark.parametrize(("package", "name"), MADE, ids=str)
def test_every_technique_has_a_trial_setting_of_its_own_without_names_of_layers(package: Any, name: str) -> None:
    cls = getattr(package, name)
    assert "trial" in vars(cls), f"{name} has no trial: constructor arguments with which a short run shows what it does"
    assert not {"include", "exclude", "name"} & set(cls.trial)
    made = cls(**cls.trial)
    assert {key: made.settings[key] for key in cls.trial} == dict(cls.trial)


@pytest.mark.parametrize("entry", [*settings.CANONICAL, *strategy_settings.CANONICAL], ids=str)
def test_the_first_entry_of_a_technique_is_its_trial(entry: Any) -> None:
    cls = getattr(callbacks if hasattr(callbacks, entry.name) else strategies, entry.name)
    added = {key: value for key, value in entry.arguments.items() if key not in cls.trial}
    assert {**cls.trial, **added} == entry.arguments
    assert set(added) <= {"include", "exclude"}
