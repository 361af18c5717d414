"""Train every technique of one tree at its trial setting, and keep what each run leaves behind.

``compare_commits.py`` runs this file in a process of its own for each tree, with the tree's package on ``PYTHONPATH``. The
module, the data and the ranks are those of the tree that this file is in, so that both trees train the same.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import inspect
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger
from lightning_utilities.core import rank_zero

TESTING = Path(__file__).parents[1] / "lightning_grad" / "testing"
RANKS = 2
PACKAGES = {
    "callbacks": ("tests.contract.settings", "adamw"),
    "strategies": ("tests.contract.strategy_settings", "sgd"),
}
TIMED = "_ms"  # milliseconds differ from run to run


def load(path: Path) -> ModuleType:
    """Import a file of the tree that this file is in, whatever tree ``PYTHONPATH`` names."""
    name = f"beside_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


reference = load(TESTING / "reference.py")
ranks = load(TESTING / "ranks.py")
states_of_runs = load(TESTING / "states.py")


# What is run.


def entries(every: bool) -> dict[str, dict[str, Any]]:
    """Return the settings of this tree, by the name of the technique and of the variant.

    Args:
        every: Whether to return every entry of the contract suite, rather than ``trial`` of each class. Where a class has no
            ``trial``, its first entry in the contract suite stands for it.
    """
    found: dict[str, dict[str, Any]] = {}
    for package, (settings, optimizer) in PACKAGES.items():
        trials = {} if every else trials_of(package)
        if trials:
            listed = [(name, name, trial, optimizer) for name, trial in trials.items()]
        else:
            contract = importlib.import_module(settings)
            chosen = contract.CANONICAL if not every else getattr(contract, "TECHNIQUES", None) or contract.SCHEMES
            listed = [(str(e), e.name, e.arguments, getattr(e, "optimizer", optimizer)) for e in chosen]
        for key, name, arguments, made in listed:
            found[key] = {"package": package, "name": name, "arguments": dict(arguments), "optimizer": made}
    return found


def trials_of(package: str) -> dict[str, Mapping[str, Any]]:
    """Return the trial setting of every exported class that can be made; nothing if one has none."""
    public = importlib.import_module(f"lightning_grad.{package}")
    classes = {name: getattr(public, name) for name in public.__all__}
    made = {name: cls for name, cls in classes.items() if not inspect.isabstract(cls)}
    return {name: cls.trial for name, cls in made.items()} if all("trial" in vars(cls) for cls in made.values()) else {}


# One run.


class Rows(Logger):
    """Keeps every row of metrics."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    name = "rows"
    version = 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, {key: value for key, value in metrics.items() if not key.endswith(TIMED)}))


class States(pl.Callback):
    """Copies the states of the other callbacks where a last checkpoint would: attributes of a fit end with it."""

    def __init__(self) -> None:
        self.states: list[Any] = []

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        others = [callback for callback in trainer.callbacks if callback is not self]
        self.states = [copy.deepcopy(callback.state_dict()) for callback in others]


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """Collect what is printed and warned of through Lightning."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger, level = rank_zero.log, rank_zero.log.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        lines += [str(warning.message) for warning in warned]


def train(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Fit the small classifier with one technique, and return what that leaves behind."""
    technique = getattr(importlib.import_module(f"lightning_grad.{entry['package']}"), entry["name"])
    module, rows, states = reference.make_classifier(optimizer=entry["optimizer"]), Rows(), States()
    with heard() as lines:
        made = technique(**copy.deepcopy(dict(entry["arguments"])))
        callbacks, strategy = ([made], "auto") if entry["package"] == "callbacks" else ([], made)
        devices = 1 if entry["package"] == "callbacks" else RANKS
        arguments = {"strategy": strategy, "devices": devices, "logger": rows, "log_every_n_steps": 2}
        trainer, module = reference.fit([*callbacks, states], module, **arguments)
    left = states_of_runs.state_of(trainer, module)
    return {
        "weights": left["module"],
        "optimizers": left["optimizers"],
        "random": left["random"],
        "state": [states.states, state_of_strategy(strategy)],
        "metrics": [rows.rows, untimed(trainer.callback_metrics)],
        "messages": [line.replace(os.getcwd(), "") for line in lines],
    }


def untimed(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in metrics.items() if not key.endswith(TIMED)}


def state_of_strategy(strategy: Any) -> Any:
    if not hasattr(strategy, "memory"):
        return None
    ledger = strategy.ledger
    return [strategy.memory, ledger.steps, ledger.sent_bytes, ledger.dense_bytes]


def run(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run leaves behind, on two ranks for a strategy, or the error."""
    try:
        if entry["package"] == "callbacks":
            return train(entry)
        return {"ranks": ranks.on_ranks(RANKS, train, entry)}
    except Exception:
        return {"error": traceback.format_exc()}


def fitting(entry: Mapping[str, Any], own: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return a setting that this tree's constructor takes: the entry, or this tree's own where an argument was renamed.

    Args:
        entry: A setting of the newer tree.
        own: Those of this tree.

    Returns:
        Mapping: The setting; ``None`` if this tree has no such technique.
    """
    technique = getattr(importlib.import_module(f"lightning_grad.{entry['package']}"), entry["name"], None)
    if technique is None:
        return None
    try:
        technique(**copy.deepcopy(dict(entry["arguments"])))
    except (TypeError, ValueError):
        return next((other for other in own.values() if other["name"] == entry["name"]), entry)
    return entry


def main(request: str, answer: str) -> None:
    """Run what the request asks for; without settings in it, those of this tree."""
    torch.set_num_threads(1)
    wanted: dict[str, Any] = torch.load(request, weights_only=False)
    own = entries(wanted["every"])
    results = {}
    for name, entry in (wanted["entries"] or own).items():
        if wanted["only"] and not {name, entry["name"]} & set(wanted["only"]):
            continue
        used = fitting(entry, own)
        if used is not None:
            results[name] = {"entry": used, "left": run(used)}
    torch.save({"own": own, "results": results, "package": sys.modules["lightning_grad"].__file__}, answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
