"""Run a module's own steps without a trace. Every technique that inspects the module outside training uses this.

Inside :func:`quiet`, ``training_step`` logs nothing. Afterwards the module, its metrics and the
random streams are bitwise as before. Techniques that act only on training check :func:`is_quiet`.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast
from weakref import WeakSet

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_grad.core.dispatch import WrapOrder, wrap_method
from lightning_grad.core.module_state import Snapshot
from lightning_grad.core.views.weight_view import close_windows, open_windows
from lightning_grad.data.random_streams import generators_kept, named_generators, random_streams_kept

_QUIET: WeakSet[nn.Module] = WeakSet()
_PLACES = ("name", "version", "save_dir", "log_dir", "root_dir", "sub_dir")  # a muted logger still returns these


def is_quiet(pl_module: nn.Module) -> bool:
    """Return True while the module is run for inspection rather than training."""
    return pl_module in _QUIET


@contextmanager
def quiet(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    evaluate: bool = True,
    check: bool = True,
    advice: str = "",
    display_name: str = "A technique",
) -> Iterator[None]:
    """Run the module without leaving a trace.

    It restores, bit for bit: training modes, buffers, gradients (``None`` inside), frozen
    parameters, states of torchmetrics, all other attributes with the contents of tensors,
    generators, containers and objects of user classes, and the random states of Python, numpy and
    torch (CPU and CUDA) and of global generators that methods of the module use. It mutes
    ``self.log``, ``self.print`` and the loggers.

    Args:
        trainer: The trainer.
        pl_module: Its module. If it is quiet already, it stays quiet until the outer context ends.
        evaluate: Use eval mode and run compiled code eagerly. Otherwise keep the modes and the
            compiled code.
        check: Raise if the step changes a parameter. This reads all weights before and after.
        advice: Ends the error about such a step: what else to do.
        display_name: Name of the technique, for errors.

    Raises:
        RuntimeError: If the step changed a trained parameter, or lazy layers have no parameters
            yet.
    """
    _refuse_lazy(pl_module, display_name)
    parameters = list(pl_module.parameters())
    frozen = sum(p.numel() for p in parameters if not p.requires_grad)
    # Frozen parameters are copied if they are no larger than the trained ones: they may be a teacher
    # that the step updates. A copy of a large frozen base model would cost too much memory.
    copied = frozen <= sum(p.numel() for p in parameters if p.requires_grad)
    with ExitStack() as stack:
        stack.enter_context(_parameters_as_they_are(pl_module, check, copied, advice, display_name))
        stack.enter_context(unseen(trainer, pl_module, copied))
        if evaluate:
            stack.enter_context(eager())
            if torch.backends.cudnn.enabled and any(isinstance(module, nn.RNNBase) for module in pl_module.modules()):
                # cuDNN has no backward pass for an RNN in eval mode.
                stack.callback(setattr, torch.backends.cudnn, "enabled", True)
                torch.backends.cudnn.enabled = False
            pl_module.eval()
        if pl_module not in _QUIET:
            _QUIET.add(pl_module)
            stack.callback(_QUIET.discard, pl_module)
        yield


@contextmanager
def unseen(trainer: pl.Trainer, pl_module: pl.LightningModule, copies_frozen: bool = False) -> Iterator[None]:
    """Restore what a module's step changes except parameters and gradients, and mute its logs.

    Args:
        trainer: The trainer.
        pl_module: Its module.
        copies_frozen: Whether frozen parameters are restored too.
    """
    modules = list(pl_module.modules())
    known = set(map(id, modules))
    with ExitStack() as stack:
        stack.enter_context(random_streams_kept())
        stack.enter_context(generators_kept(named_generators(map(type, modules))))
        stack.enter_context(silence(trainer, pl_module))
        for module in modules:
            stack.callback(Snapshot(module, copies_frozen, known).restore)
        stack.callback(close_windows, pl_module, open_windows(pl_module))
        yield


def _refuse_lazy(pl_module: pl.LightningModule, display_name: str) -> None:
    lazy = next((name for name, p in pl_module.named_parameters() if is_lazy(p)), None)
    if lazy is not None:
        raise RuntimeError(
            f"{display_name} cannot run {type(pl_module).__name__} outside training while lazy layers have no "
            f"parameters: {lazy!r} has no size yet. Run the network once on a batch, under torch.no_grad(), in the "
            "module's constructor or before the fit."
        )


@contextmanager
def aside(module: nn.Module) -> Iterator[None]:
    """Restore random streams and buffers after an extra run of a module in training; cheap enough for every step."""
    with random_streams_kept():
        kept = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
        try:
            yield
        finally:
            for buffer, value in kept:
                buffer.data.copy_(value)  # .data: autograd must not see a change of a buffer that the step's graph uses


@contextmanager
def silence(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[None]:
    """Mute ``self.log``, ``self.log_dict``, ``self.print`` and the loggers of the module."""

    def nothing(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        return None

    loud = [module for module in pl_module.modules() if hasattr(module, "log_dict")]
    with loggers_muted(trainer), ExitStack() as stack:
        for module, name in itertools.product(loud, ("log", "log_dict", "print")):
            stack.callback(wrap_method(module, name, nothing, order=WrapOrder.LOOK))
        yield


@contextmanager
def loggers_muted(trainer: pl.Trainer) -> Iterator[None]:
    """Mute all loggers. Does not affect ``self.log``."""
    loggers = trainer.loggers
    trainer.loggers = [cast(Any, _Mute(logger)) for logger in loggers]
    try:
        yield
    finally:
        trainer.loggers = loggers


def eager() -> AbstractContextManager[Any]:
    """Run compiled code eagerly."""
    # Compiled code must not trace the hooks that inspect it. If dynamo is not imported, nothing is
    # compiled, and importing it takes seconds.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


class _Mute:
    """A muted logger: all methods of it and of its attributes do nothing. Names and directories are still returned.

    Args:
        logger: The logger that this replaces.
    """

    def __init__(self, logger: Any = None) -> None:
        self._logger = logger

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in _PLACES:
            return _Mute()
        value = getattr(self._logger, name, None)
        return value if isinstance(value, (str, int, float, Path)) else None

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        return None

    def __enter__(self) -> _Mute:
        return self

    def __exit__(self, *args: Any) -> None:
        return None

    def __iter__(self) -> Iterator[Any]:
        return iter(())


@contextmanager
def _parameters_as_they_are(
    pl_module: pl.LightningModule, check: bool, copied: bool, advice: str, display_name: str
) -> Iterator[None]:
    """Hide gradients inside, restore them afterwards, and raise if a parameter changed."""
    parameters = dict(pl_module.named_parameters())
    watched = {name: p for name, p in parameters.items() if p.requires_grad or not copied}
    before = {name: _checksum(p) for name, p in watched.items()} if check else {}
    gradients = {name: p.grad for name, p in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None  # a backward pass would add to the gradient in place
    try:
        yield
    finally:
        for name, gradient in gradients.items():
            parameters[name].grad = gradient
    changed = [name for name, was in before.items() if not torch.equal(was, _checksum(watched[name]))]
    if changed:
        raise RuntimeError(
            f"{display_name} runs training_step without training, but the step changes the parameter {changed[0]!r}. "
            f"Change it in on_train_batch_end{advice}."
        )


def _checksum(parameter: Tensor) -> Tensor:
    value = parameter.detach()
    kind = torch.float32 if value.device.type == "mps" else torch.float64  # half precision would overflow
    size = value.abs()
    total = size if value.is_complex() else value
    return torch.stack([total.sum(dtype=kind), size.sum(dtype=kind)]).nan_to_num()  # nan would not equal itself
