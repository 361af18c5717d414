"""The user's Trainer for a trial: short, on one device, and without loggers and checkpoints."""

import importlib
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import DummyLogger
from typing_extensions import override

from lightning_grad.cli.check.sources import Run
from lightning_grad.cli.check.watch import Watch
from lightning_grad.core.roles import ROLES

EPOCHS = 3


def short_trainer(
    run: Run, technique: type[Any] | None, watch: Watch, folder: str, arguments: dict[str, Any]
) -> pl.Trainer:
    """Build the Trainer of a trial.

    Args:
        run: The module, its data and the user's arguments of the Trainer.
        technique: Class of a callback or strategy; ``None`` for a trial without one.
        watch: Measures the trial.
        folder: Folder for files.
        arguments: Arguments that replace the user's.
    """
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
    fixed = {**_SHORT, **length, "default_root_dir": folder, "logger": _NoLogs(folder)}
    trainer: Any = _namespace_of(run.module).Trainer
    made: pl.Trainer = trainer(**{**run.arguments, **fixed, **arguments, "callbacks": watch.around(callbacks)})
    return made


def _namespace_of(module: pl.LightningModule) -> Any:
    """Return ``lightning.pytorch`` or ``pytorch_lightning``, whose modules only train in their own Trainer."""
    is_other = any(cls.__module__.startswith("pytorch_lightning.") for cls in type(module).__mro__)
    return importlib.import_module("pytorch_lightning") if is_other else pl


# What a trial changes about the user's Trainer: it is short, on one device, and writes nothing.
_SHORT: Mapping[str, Any] = {
    "max_epochs": EPOCHS,
    "min_epochs": EPOCHS,  # early stopping would make runs that differ in length
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
    # By name, because both namespaces of Lightning count.
    return any(cls.__name__ in ("Checkpoint", "ProgressBar", "ModelSummary") for cls in type(callback).__mro__)


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
    """A logger that accepts everything and writes nothing, so modules that use one train as usual.

    Args:
        folder: Folder for what the module itself writes next to its logs.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self._folder = folder

    @property
    @override
    def save_dir(self) -> str:
        return self._folder

    @property
    @override
    def log_dir(self) -> str:
        return self._folder

    @property
    @override
    def experiment(self) -> Any:
        return _Anything()
