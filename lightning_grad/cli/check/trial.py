"""One short fit of the user's project, with a technique or without one."""

import io
import logging
import math
import os
import signal
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelSummary, ProgressBar
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities.seed import isolate_rng
from typing_extensions import override

import lightning_grad
from lightning_grad.cli.catalog import is_strategy
from lightning_grad.cli.check.sources import Run, ShortProject
from lightning_grad.cli.check.watch import Phase, Watch
from lightning_grad.core import Chosen
from lightning_grad.core.compatibility import STRATEGIES, TITLES
from lightning_grad.core.roles import ROLES

EPOCHS = 3

Status = Literal["runs", "refused", "FAILED", "in use", "not tried"]

_REFUSALS = (ValueError, TypeError, RuntimeError, LookupError, OSError)
_PACKAGE = Path(lightning_grad.__file__).parent
_HERE = Path(__file__).parent


@dataclass
class Outcome:
    """What came of a fit.

    Args:
        status: Whether it ended well.
        words: What the technique said: its refusal, or its warnings; the traceback of a failure.
        seconds: Time of each batch that counts.
        batches: Number of training batches.
        calls: Calls of the module's steps outside of training batches.
        chosen: What the technique acted on.
        device: Device of the module.
        peak: Peak memory of the device in bytes.
        is_finite: Whether all weights are finite at the end.
    """

    status: Status = "runs"
    words: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    batches: int = 0
    calls: Mapping[Phase, int] = field(default_factory=dict)
    chosen: Chosen | None = None
    device: str = ""
    peak: int | None = None
    is_finite: bool = True


class InterruptedTrialError(Exception):
    """Ctrl-C was pressed. Lightning turns it into SystemExit."""


def try_out(
    project: ShortProject, technique: type[Any] | None, batches: int, accelerator: str = "auto", **arguments: Any
) -> Outcome:
    """Fit the project once, with a technique at its trial setting, and return what came of it.

    Args:
        project: Builds the module and its data.
        technique: Class of a callback or strategy; ``None`` for a fit without one.
        batches: Batches for each epoch.
        accelerator: Accelerator, unless the config asks for the CPU.
        **arguments: Further arguments of the Trainer.

    Raises:
        InterruptedTrialError: After Ctrl-C.
    """
    watch = Watch()
    with undisturbed() as said, tempfile.TemporaryDirectory() as folder:
        try:
            run = project.make(batches, arguments.get("devices", 1))
            known = None if technique is None else _known_before(run, technique)
            if known is not None:
                return known
            trainer = _trainer(run, technique, watch, folder, {"accelerator": accelerator, **arguments})
            trainer.fit(run.module, **run.data)
        except (KeyboardInterrupt, SystemExit):
            raise InterruptedTrialError from None
        except Exception as error:
            return outcome_of(error, technique)
    words = [] if technique is None else [text for text in said if text.startswith(technique.__name__)]
    measured = (watch.seconds, watch.batches, dict(watch.calls), watch.chosen, watch.device, watch.peak)
    return Outcome("runs", words, *measured, _is_finite(run.module))


def _known_before(run: Run, technique: type[Any]) -> Outcome | None:
    """Return the outcome of a technique that the config already uses, or that refuses the strategy of the config."""
    if any(type(callback) is technique for callback in callbacks_of(run)):
        return Outcome("in use", [f"The config already uses {technique.__name__}."])
    strategy = run.arguments.get("strategy")
    kind = StrategyRegistry[strategy]["strategy"] if strategy in StrategyRegistry else type(strategy)
    field_of = next((STRATEGIES[cls.__name__] for cls in kind.__mro__ if cls.__name__ in STRATEGIES), None)
    if field_of is None or is_strategy(technique):
        return None
    answer = technique(**technique.trial).works_with().answers[field_of]
    words = f"{TITLES[field_of]} ({kind.__name__})"
    return Outcome("refused", [str(answer.error(technique.__name__, words))]) if answer.is_no else None


def _trainer(run: Run, technique: type[Any] | None, watch: Watch, folder: str, arguments: dict[str, Any]) -> pl.Trainer:
    callbacks = callbacks_of(run)
    watch.technique = None if technique is None else technique(**technique.trial)
    if isinstance(watch.technique, Callback):
        callbacks.insert(_place(callbacks, watch.technique), watch.technique)
    elif watch.technique is not None:
        arguments["strategy"] = watch.technique
    if run.arguments.get("accelerator") == "cpu":
        arguments["accelerator"] = "cpu"
    _drop_writers(run.module)
    length = dict.fromkeys(("limit_train_batches", "limit_val_batches"), run.batches)
    length["log_every_n_steps"] = run.batches // (run.arguments.get("accumulate_grad_batches") or 1)
    fixed = {**_SHORT, **length, "default_root_dir": folder, "logger": _NoLogs()}
    return pl.Trainer(**{**run.arguments, **fixed, **arguments, "callbacks": watch.around(callbacks)})


# What a trial changes about the user's Trainer: it is short, on one device, and writes nothing.
_SHORT: Mapping[str, Any] = {
    "max_epochs": EPOCHS,
    "min_epochs": None,
    "max_steps": -1,
    "min_steps": None,
    "max_time": None,
    "limit_test_batches": None,
    "limit_predict_batches": None,
    "num_sanity_val_steps": 0,
    "val_check_interval": None,
    "check_val_every_n_epoch": 1,
    "overfit_batches": 0.0,
    "fast_dev_run": False,
    "barebones": False,
    "profiler": None,
    "strategy": "auto",
    "devices": 1,
    "num_nodes": 1,
    **dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
}


def callbacks_of(run: Run) -> list[Callback]:
    """Return the callbacks of the user's Trainer, without those that write files or print."""
    return [callback for callback in run.arguments.get("callbacks") or [] if not _writes(callback)]


def _writes(callback: Callback) -> bool:
    return isinstance(callback, Checkpoint | ProgressBar | ModelSummary)


def _drop_writers(module: pl.LightningModule) -> None:
    """Drop the checkpoints that a module itself adds to the Trainer."""
    configured = module.configure_callbacks

    def configure_callbacks() -> list[Callback]:
        found: Any = configured()
        return [each for each in (found if isinstance(found, list | tuple) else [found]) if not _writes(each)]

    module.__dict__["configure_callbacks"] = configure_callbacks


def _place(callbacks: list[Callback], technique: Callback) -> int:
    """Return where in the list a technique belongs: before those of a later role, otherwise at the end."""
    role = getattr(technique, "role", None)
    later = ROLES[ROLES.index(role) + 1 :] if role in ROLES else ()
    found = (place for place, callback in enumerate(callbacks) if getattr(callback, "role", None) in later)
    return next(found, len(callbacks))


class _Anything:
    """Accepts any use of a logger's experiment."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self

    def __getitem__(self, key: Any) -> Any:
        return self

    def __setitem__(self, key: Any, value: Any) -> None: ...


class _NoLogs(DummyLogger):
    """A logger that accepts everything and writes nothing, so that modules that use one train as usual."""

    @property
    @override
    def experiment(self) -> Any:
        return _Anything()


@contextmanager
def undisturbed() -> Iterator[list[str]]:
    """Mute prints, logs and warnings, and restore random states and the handler of Ctrl-C; yield the warnings."""
    said: list[str] = []
    handler, level, seed = (
        signal.getsignal(signal.SIGINT),
        logging.root.manager.disable,
        os.environ.get("PL_GLOBAL_SEED"),
    )
    with isolate_rng(), warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_, **__: said.append(str(message))
        logging.disable(logging.ERROR)
        try:
            yield said
        finally:
            logging.disable(level)
            if handler is not None:
                signal.signal(signal.SIGINT, handler)  # Lightning ignores it after Ctrl-C
            if seed is None:
                os.environ.pop("PL_GLOBAL_SEED", None)
            else:
                os.environ["PL_GLOBAL_SEED"] = seed


def outcome_of(error: Exception, technique: type[Any] | None) -> Outcome:
    """Return a refusal if the technique itself raised the error in words about itself, otherwise a failure."""
    frames = traceback.extract_tb(error.__traceback__)
    raised_in = Path(frames[-1].filename)
    is_ours = raised_in.is_relative_to(_PACKAGE) and not raised_in.is_relative_to(_HERE)
    named = technique is not None and technique.__name__ in str(error)
    if named and is_ours and isinstance(error, _REFUSALS):
        return Outcome("refused", [str(error)])
    return Outcome("FAILED", [traceback_of(error)])


def traceback_of(error: Exception) -> str:
    """Return the traceback of an error; it begins with the user's code, if that was reached."""
    lines = traceback.extract_tb(error.__traceback__)
    known = [_PACKAGE, Path(pl.__file__).parents[1], Path(torch.__file__).parent]
    outside = [not any(Path(frame.filename).is_relative_to(folder) for folder in known) for frame in lines]
    start = outside.index(True) if True in outside else 0
    shown = traceback.format_list(lines[start:]) + traceback.format_exception_only(error)
    return "".join(shown).rstrip()


def _is_finite(module: torch.nn.Module) -> bool:
    return all(math.isfinite(value.detach().float().sum().item()) for value in module.parameters())
