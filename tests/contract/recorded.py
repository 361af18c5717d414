"""Runs that several guarantees look at: each is made once, and every test of it looks at what it left.

``bare`` is a fit of one technique and nothing else; ``watched`` one in which everything is saved and looked at, step by step;
``reused`` several fits of one callback, the first of which breaks off. ``None`` stands for no technique.

``conftest.py`` orders the tests of this folder by technique, so that the latest runs are all that is kept. These runs are
shared: tests read them and change nothing.
"""

from __future__ import annotations

import copy
import functools
import io
import pickle
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import Tensor, nn

from lightning_grad.testing import (
    TOKENS,
    WIDTH,
    PicklerOfNoRun,
    StopAt,
    fit,
    loaders,
    make_classifier,
    state_of,
    traces,
    trainer_traces,
)
from tests.contract.settings import Technique

KEPT = 6  # runs of each kind: those of the technique at hand, and those without one
EXPECTED_WARNINGS = (
    ".*the best checkpoint",  # these runs monitor val_loss from the first epoch on
    "Be aware that when using `ckpt_path`",
    "`.fit.ckpt_path=None.` was called without a model",
    ".*there is no last checkpoint available",
)


def _quietly(function: Callable[..., Any]) -> Callable[..., Any]:
    """Do not leave it to the test that comes first to expect what a run that saves everything warns of."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with warnings.catch_warnings():
            for message in EXPECTED_WARNINGS:
                warnings.filterwarnings("ignore", message)
            return function(*args, **kwargs)

    return call


class _Saver(ModelCheckpoint):
    """Saves beside others that differ in what Lightning does not tell them apart by."""

    @property
    def state_key(self) -> str:
        return f"{self.dirpath} {self.filename}"


def built(technique: Technique | None) -> list[Any]:
    """Return a list of the technique's callback, or of none."""
    return [] if technique is None else [technique.build()]


class Run:
    """What a fit left behind; to be made when the fit has ended, before random numbers are drawn.

    Args:
        trainer: Of the fit.
        module: Of the fit.
        callbacks: The technique; nothing for the run without.
    """

    def __init__(self, trainer: Any, module: Any, callbacks: list[Any]) -> None:
        self.trainer, self.module, self.callbacks = trainer, module, callbacks
        state = {**state_of(trainer, module), "steps": trainer.global_step}
        self.left: dict[str, Any] = copy.deepcopy({**state, "callbacks": [c.state_dict() for c in callbacks]})
        """All that must be bitwise the same if the run is resumed."""
        self.traces = [traces(module), trainer_traces(trainer)]  # before a later fit of the callback tidies up

    @property
    def weights(self) -> dict[str, Tensor]:
        return self.left["module"]

    @property
    def metrics(self) -> dict[str, Any]:
        """Of the module; those of a technique have a namespace."""
        return {key: value for key, value in self.trainer.callback_metrics.items() if "/" not in key}

    def assert_nothing_is_left(self, plain: Run) -> None:
        """Raise unless module and trainer look like those of the run without a technique, and the module pickles."""
        assert self.traces == plain.traces
        pickle.loads(pickle.dumps(self.module.encoder))
        pickle.loads(pickle.dumps(self.module.mix))


def run(callbacks: list[Any], **arguments: Any) -> Run:
    """Fit a fresh module with the technique, or with nothing."""
    return Run(*fit(callbacks, **arguments), callbacks)


@functools.lru_cache(maxsize=KEPT)
def bare(technique: Technique | None, accumulate: int = 1) -> Run:
    """Fit with the technique and nothing else."""
    return run(built(technique), resumable=True, accumulate_grad_batches=accumulate)


class Watch(pl.Callback):
    """Looks at the module and the technique in mid-fit, as other callbacks might."""

    def __init__(self, technique: Any) -> None:
        self.technique = technique
        self.logits: dict[int, list[Tensor]] = {}  # of every validation, by the step at which it ran
        self.keys: list[list[str]] = []
        self.copies: list[tuple[nn.Module, Tensor]] = []
        self.inputs = torch.randn(3, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.keys.append([*pl_module.state_dict(), *dict(pl_module.named_parameters())])
        PicklerOfNoRun(io.BytesIO()).dump(self.technique)

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if args[2] > 0:  # one batch of each validation
            return
        with torch.inference_mode(False), torch.no_grad():
            for twin in (copy.deepcopy(pl_module.encoder), pickle.loads(pickle.dumps(pl_module.encoder))):
                self.copies.append((twin, pl_module.encoder(self.inputs).clone()))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.logits[trainer.global_step] = list(pl_module.validated)


class Watched(Run):
    """What a fit left behind that was looked at and saved all along.

    Args:
        trainer: Of the fit.
        module: Of the fit.
        callbacks: The technique; nothing for the run without.
        watch: What looked.
        folder: Where everything was saved; it goes with this object.
    """

    def __init__(self, trainer: Any, module: Any, callbacks: list[Any], watch: Watch, folder: Path) -> None:
        super().__init__(trainer, module, callbacks)
        self.watch, self.folder = watch, folder
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)

    def saved(self, kind: str) -> dict[int, Path]:
        """Return the checkpoints of one kind by their step.

        Args:
            kind: ``"steps"``, every second step; ``"epochs"``, after the validation of every epoch; ``"weights"``, the same
                without optimizers.
        """
        paths = [path for path in (self.folder / kind).glob("*.ckpt") if path.stem != "last"]
        return dict(sorted((int(path.stem.split("step=")[1]), path) for path in paths))


@functools.lru_cache(maxsize=KEPT)
@_quietly
def watched(technique: Technique | None, accumulate: int = 1) -> Watched:
    """Fit, look at module and technique at every step, and save at every place where Lightning saves."""
    callbacks, folder = built(technique), Path(tempfile.mkdtemp())
    watch = Watch(callbacks[0] if callbacks else None)
    saving = [
        _Saver(folder / "steps", save_top_k=-1, every_n_train_steps=2),
        _Saver(folder / "epochs", save_top_k=-1, monitor="val_loss", save_last=True),
        _Saver(folder / "weights", save_top_k=-1, monitor="val_loss", save_weights_only=True),
    ]
    trainer, module = fit([*callbacks, watch, *saving], resumable=True, accumulate_grad_batches=accumulate)
    return Watched(trainer, module, callbacks, watch, folder)


STEP = 14  # at which a run breaks off, in mid-epoch


def end(callbacks: list[Any], how: str, others: Sequence[Any] = ()) -> Run:
    """Fit a fresh module and break off.

    Args:
        callbacks: The technique, or nothing.
        how: ``"exception"`` and ``"interrupt"`` at the start of a batch, or ``"in on_fit_start"``.
        others: Callbacks that are listed behind what breaks off.
    """
    module, trainers = make_classifier(), []
    early = how == "in on_fit_start"
    stop = StopAt(-1 if early else STEP, KeyboardInterrupt if how == "interrupt" else RuntimeError)
    stop.setup = lambda trainer, *_, **__: trainers.append(trainer)  # type: ignore[method-assign]
    if early:
        stop.on_fit_start = lambda *_: stop.on_train_batch_start(SimpleNamespace(global_step=-1))  # type: ignore[method-assign]
    with pytest.raises((RuntimeError, SystemExit), match=None if how == "interrupt" else "on purpose"):
        fit([*callbacks, stop, *others], module)
    return Run(trainers[0], module, callbacks)


@functools.cache
def ended_without(how: str) -> Run:
    """Fit without a technique and break off; see :func:`end`."""
    return end([], how)


@dataclass(eq=False)
class Reused:
    """What one callback left behind in four fits and a validation."""

    broken: Run  # by an exception
    saved: dict[str, dict[str, Any]]  # the checkpoints that the exception led to, by who wrote them
    after_an_exception: Run
    after_a_validation: Run


@functools.lru_cache(maxsize=KEPT)
@_quietly
def reused(technique: Technique | None) -> Reused:
    """Fit until an exception, save, fit anew, validate another run's checkpoint, and fit anew, with one callback."""
    callbacks = built(technique)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        saving = [
            OnExceptionCheckpoint(folder, "on_exception"),
            _Saver(folder, "full", save_on_exception=True, every_n_epochs=100),
            _Saver(folder, "weights", save_on_exception=True, every_n_epochs=100, save_weights_only=True),
        ]
        broken = end(callbacks, "exception", saving)
        broken.trainer.save_checkpoint(folder / "by_hand.ckpt")
        saved = {path.stem: torch.load(path, weights_only=True) for path in folder.glob("*.ckpt")}
    first = run(callbacks)
    path = list(watched(technique).saved("epochs").values())[-1]
    first.trainer.validate(first.module, loaders()[1], ckpt_path=path, verbose=False)
    return Reused(broken, saved, first, run(callbacks))
