"""Guards that raise if the code of a step synchronizes the host with the device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from lightning_grad.core.syncs import SYNCING

_ATEN = torch.ops.aten
_READING = {Tensor.cpu, Tensor.tolist}  # numpy() is not among them: it raises for a tensor on a device
_SYNCING = {getattr(_ATEN, name).default: words for name, words in SYNCING.items()}


class SyncError(AssertionError):
    """Code of a step waits for the device."""


class NoSync:
    """Raise inside the block if a value is read on the host.

    Patching ``Tensor.item`` instead would break torch's optimizers, which read their own step counts.

    Example:
        >>> with NoSync():
        ...     torch.ones(1).item()
        Traceback (most recent call last):
        lightning_grad.testing.syncs.SyncError: item(), float(), int() or bool() of a tensor waits for the device
        >>> with NoSync():
        ...     torch.ones(1).tolist()
        Traceback (most recent call last):
        lightning_grad.testing.syncs.SyncError: Tensor.tolist waits for the device
    """

    def __enter__(self) -> NoSync:
        self._modes = ExitStack()
        self._modes.enter_context(_Operators())  # type: ignore[no-untyped-call]
        self._modes.enter_context(_Methods())
        return self

    def __exit__(self, *error: object) -> None:
        self._modes.close()


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees what operators do, also those of a backward pass."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _SYNCING:
            raise SyncError(f"{_SYNCING[func]} waits for the device")
        if func is _ATEN._to_copy.default and "device" in kwargs:
            raise SyncError(f"copies to {kwargs['device']}")
        return func(*args, **kwargs)


class _Methods(TorchFunctionMode):
    """Sees methods that call no operator if the tensor is on the CPU already."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READING:
            raise SyncError(f"Tensor.{func.__name__} waits for the device")
        return func(*args, **(kwargs or {}))


def guarded(function: Callable[..., Any], seen: list[str], name: str) -> Callable[..., Any]:
    """Wrap a function in :class:`NoSync`, except for the first call with this name and the last batch of an epoch.

    Args:
        function: For example a hook of a step.
        seen: List to which each call appends the name.
        name: The name.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        seen.append(name)
        # The first call may find out what it needs for all steps, and the last batch of an epoch is a log step.
        if seen.count(name) == 1 or getattr(args[0] if args else None, "is_last_batch", False):
            return function(*args, **kwargs)
        try:
            with NoSync():
                return function(*args, **kwargs)
        except SyncError as error:
            raise SyncError(f"{name}: {error}").with_traceback(error.__traceback__) from error

    return call


class GuardStep(pl.Callback):
    """Guard the training step, backward and everything wrapped around them; place it after the technique in the callback list.

    Args:
        seen: List to which each call appends ``"training_step"`` or ``"backward"``.
    """

    def __init__(self, seen: list[str]) -> None:
        self.seen = seen

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step = guarded(pl_module.training_step, self.seen, "training_step")
        pl_module.training_step = step  # type: ignore[method-assign]
        trainer.strategy.backward = guarded(trainer.strategy.backward, self.seen, "backward")  # type: ignore[method-assign]
