"""Callbacks that look at a fit and save it, and keep errors of doing so rather than ending the fit."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from typing_extensions import override

from lightning_grad.testing.traces import PicklerOfNoRun


class Saver(ModelCheckpoint):
    """Saves next to others of its kind.

    Args:
        folder: Folder of its checkpoints.
        **arguments: As ``ModelCheckpoint`` takes them.
    """

    def __init__(self, folder: Path, **arguments: Any) -> None:
        super().__init__(folder, **arguments)
        self.errors: list[Exception] = []

    @property
    def state_key(self) -> str:
        return f"{self.dirpath} {self.filename}"

    def _save_checkpoint(self, trainer: Any, filepath: str) -> None:
        with keeping(self.errors):
            super()._save_checkpoint(trainer, filepath)

    def raise_error(self) -> None:
        """Raise the first error of saving, if there was one."""
        for error in self.errors:
            raise error


class SaverOnException(OnExceptionCheckpoint):
    """Saves when the fit ends with an exception."""

    @override
    def on_exception(self, *arguments: Any) -> None:
        with contextlib.suppress(Exception):  # who needs the checkpoint finds none
            super().on_exception(*arguments)


def saver_on_exception(folder: Path, filename: str, **rest: Any) -> Saver:
    """Return a callback that saves only when the fit ends with an exception."""
    return Saver(folder, filename=filename, save_on_exception=True, every_n_epochs=10_000, **rest)


def savers_on_exception(folder: Path) -> list[Any]:
    """Return one callback for each way in which Lightning saves when the fit ends with an exception."""
    weights = saver_on_exception(folder, "weights", save_weights_only=True)
    return [SaverOnException(str(folder), "on_exception"), saver_on_exception(folder, "full"), weights]


class Begun(pl.Callback):
    """Counts the training batches that have begun; to come first in the list."""

    def __init__(self) -> None:
        self.batches = 0

    @override
    def on_train_batch_start(self, *_: Any) -> None:
        self.batches += 1


class Outputs(pl.Callback):
    """Keeps what the children of the module return in ``validation_step``, by the step at which it ran.

    To come last in the list: calls that other callbacks make between the steps do not count.
    """

    def __init__(self) -> None:
        self.of: dict[int, list[Tensor]] = {}
        self.calls: list[tuple[nn.Module, tuple[Any, ...], Tensor]] = []  # of the current batch

    @override
    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        seen: list[Tensor] = []
        self.of[trainer.global_step] = seen
        children, step = {id(child) for child in pl_module.children()}, trainer.strategy.validation_step

        def keep(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if id(module) in children and isinstance(output, Tensor):
                self.calls.append((module, inputs, output.detach().clone()))

        def validation_step(*arguments: Any) -> Any:
            self.calls.clear()
            handle = register_module_forward_hook(keep)
            try:
                return step(*arguments)
            finally:
                handle.remove()
                seen.extend(output for _, _, output in self.calls)

        trainer.strategy.validation_step = validation_step

    @override
    def on_validation_end(self, trainer: Any, *_: Any) -> None:
        vars(trainer.strategy).pop("validation_step", None)

    @override
    def on_exception(self, trainer: Any, *_: Any) -> None:
        vars(trainer.strategy).pop("validation_step", None)


class Watch(Outputs):
    """Looks at the module and the technique in mid-fit, as other callbacks might.

    Args:
        technique: The callback under test; ``None`` in the run without one.
        copying: Whether to look at keys and copy the technique after each step, and the module's children in validation.
    """

    def __init__(self, technique: Any, copying: bool = True) -> None:
        super().__init__()
        self.technique, self.copying = technique, copying
        self.keys: list[tuple[list[str], list[str]]] = []  # of the state dict, and the names of the parameters
        self.copies: list[tuple[nn.Module, tuple[Any, ...], Tensor]] = []
        self.pickling_errors: list[Exception] = []
        self.copying_errors: list[Exception] = []

    @override
    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if not self.copying:
            return
        self.keys.append((list(pl_module.state_dict()), list(dict(pl_module.named_parameters()))))
        with keeping(self.pickling_errors), without_links(self.technique) as technique:
            PicklerOfNoRun(io.BytesIO()).dump(technique)

    @override
    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *arguments: Any) -> None:
        if arguments[2] > 0 or not self.copying:  # one batch of each validation
            return
        with keeping(self.copying_errors), torch.inference_mode(False), torch.no_grad():
            first = {id(child): (child, inputs, output) for child, inputs, output in reversed(self.calls)}
            for child, inputs, output in reversed(first.values()):
                for twin in (copy.deepcopy(child), pickle.loads(pickle.dumps(child))):
                    self.copies.append((twin, inputs, output))


@contextlib.contextmanager
def without_links(callback: Any) -> Iterator[Any]:
    """Remove ``log`` and ``log_dict`` during the block: Lightning sets them on a callback, and they hold the module.

    Removing them from a copy is not enough, because a bound method in the callback holds the original.
    """
    attributes = getattr(callback, "__dict__", {})
    taken = {name: attributes.pop(name) for name in ("log", "log_dict") if name in attributes}
    try:
        yield callback
    finally:
        attributes.update(taken)


@contextlib.contextmanager
def keeping(errors: list[Exception]) -> Iterator[None]:
    """Append an error of the block to a list, and go on."""
    try:
        yield
    except Exception as error:
        errors.append(error)
