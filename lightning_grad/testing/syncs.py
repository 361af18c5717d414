"""Guards that raise if the code of a step synchronizes the host with the device."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from lightning_grad.core.syncs import SYNCING

_ATEN = torch.ops.aten
_SYNCING = {getattr(_ATEN, name).default for name in SYNCING}


class NoSync(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raise inside the block if a value is read on the host.

    Patching ``Tensor.item`` instead would break torch's optimizers, which read their own step counts.

    Example:
        >>> with NoSync():
        ...     torch.ones(1).item()
        Traceback (most recent call last):
        AssertionError: aten._local_scalar_dense.default waits for the device
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _SYNCING:
            raise AssertionError(f"{func} waits for the device")
        if func is _ATEN._to_copy.default and "device" in kwargs:
            raise AssertionError(f"copies to {kwargs['device']}")
        return func(*args, **kwargs)


def guarded(function: Callable[..., Any], seen: list[str], name: str) -> Callable[..., Any]:
    """Wrap a function in :class:`NoSync`, except for the first call with this name.

    Args:
        function: For example a hook of a step.
        seen: List to which each call appends the name.
        name: The name.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        seen.append(name)
        if seen.count(name) == 1:  # a technique may sync once, to find out what it needs for all steps
            return function(*args, **kwargs)
        with NoSync():  # type: ignore[no-untyped-call]
            return function(*args, **kwargs)

    return call


class GuardStep(pl.Callback):
    """Guard the training step and everything wrapped around it; place it after the technique in the callback list.

    Args:
        seen: List to which each call appends ``"training_step"``.
    """

    def __init__(self, seen: list[str]) -> None:
        self.seen = seen

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step = guarded(pl_module.training_step, self.seen, "training_step")
        pl_module.training_step = step  # type: ignore[method-assign]
