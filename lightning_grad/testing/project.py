"""A project to try a technique on: a module with its data, built again for each fit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger

from lightning_grad.testing.reference import make_trainer

_SEED = 7
_EXPECTED = (
    "Return a LightningModule, which then brings its own train_dataloader; or (module, train_loader), "
    "(module, train_loader, validation_loader) or (module, datamodule)."
)


class _NoLogger(Logger):
    """Keeps nothing. It is there for callbacks that need a logger."""

    name = version = "none"

    def log_metrics(self, *_: Any, **__: Any) -> None:
        """Keep nothing."""

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Keep nothing."""


class Built(NamedTuple):
    """A module, and the arguments of ``Trainer.fit`` that hold its data."""

    module: Any
    data: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Project:
    """A module with its data.

    Args:
        build: Function that returns a LightningModule that loads its own data, or ``(module, train_loader)``,
            ``(module, train_loader, validation_loader)`` or ``(module, datamodule)``. It is called after seeding, once for
            each fit.
        name: Name for messages.
        arguments: Arguments for each Trainer, such as ``limit_train_batches``.
        monitor: A logged metric that checkpoints are chosen by; ``None`` for none.
        variants: Other projects by the feature that they have, such as ``"manual_optimization"``.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> project = Project(BoringModel, "boring", {"limit_train_batches": 2, "limit_val_batches": 1})
        >>> trainer, module = project.fit([], max_epochs=1)
        >>> trainer.global_step
        2
    """

    build: Callable[[], Any]
    name: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    monitor: str | None = None
    variants: Mapping[str, Project] = field(default_factory=dict)

    def make(self) -> Built:
        """Seed all random generators, and build the module and its data.

        Raises:
            TypeError: If ``build`` returns something else.
        """
        pl.seed_everything(_SEED, verbose=False)
        made = self.build()
        module, *data = made if isinstance(made, tuple) else (made,)
        if not is_a(module, "LightningModule") or len(data) > 2:
            raise TypeError(f"{self.name or _name_of(self.build)} returned {_words_of(made)}. {_EXPECTED}")
        if len(data) == 1 and is_a(data[0], "LightningDataModule"):
            return Built(module, {"datamodule": data[0]})
        return Built(module, dict(zip(("train_dataloaders", "val_dataloaders"), data, strict=False)))

    def fit(self, callbacks: list[Any], ckpt: Any = None, **arguments: Any) -> Any:
        """Fit a new module on the CPU, and return (trainer, module).

        Args:
            callbacks: Callbacks of the Trainer.
            ckpt: Path of a checkpoint to resume from. It is loaded with ``weights_only=False``.
            **arguments: Arguments of the Trainer; see :func:`~lightning_grad.testing.make_trainer` for the defaults.
        """
        return self.fit_built(self.make(), callbacks, ckpt, **arguments)

    def fit_built(self, built: Built, callbacks: list[Any], ckpt: Any = None, **arguments: Any) -> Any:
        """Fit what :meth:`make` returned, which the caller may have changed."""
        trainer = self._trainer(callbacks, **arguments)
        trainer.fit(built.module, **built.data, ckpt_path=ckpt, weights_only=None if ckpt is None else False)
        return trainer, built.module

    def _trainer(self, callbacks: list[Any], **arguments: Any) -> Any:
        for kind, argument in (("Checkpoint", "enable_checkpointing"), ("ProgressBar", "enable_progress_bar")):
            if any(is_a(callback, kind) for callback in callbacks):
                arguments.setdefault(argument, True)
        arguments.setdefault("logger", _NoLogger())
        return make_trainer(**{**copy.deepcopy(dict(self.arguments)), **arguments}, callbacks=list(callbacks))

    def validate(self, built: Built, callbacks: list[Any], ckpt: Any = None) -> None:
        """Validate what :meth:`make` returned, with the weights of a checkpoint if its path is given."""
        trainer = self._trainer(callbacks)
        data = {"dataloaders": built.data.get("val_dataloaders"), "datamodule": built.data.get("datamodule")}
        trainer.validate(
            built.module, **data, ckpt_path=ckpt, weights_only=None if ckpt is None else False, verbose=False
        )


def is_a(thing: Any, name: str) -> bool:
    """Compare class names, because both namespaces of Lightning count."""
    return any(cls.__name__ == name for cls in type(thing).__mro__)


def _name_of(function: Any) -> str:
    return getattr(function, "__qualname__", type(function).__name__)


def _words_of(made: Any) -> str:
    if not isinstance(made, tuple):
        return f"an object of type {type(made).__name__}"
    return f"({', '.join(type(part).__name__ for part in made)})"
