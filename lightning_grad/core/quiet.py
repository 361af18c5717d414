"""Running a module's own steps without leaving a trace: what all that look at a module outside its training share.

Inside :func:`quiet` a ``training_step`` logs nothing, counts nothing and moves no random stream; afterwards module, metrics
and random streams are bitwise what they were. Techniques that act on training only ask :func:`is_quiet`.
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
_TOLD = ("name", "version", "save_dir", "log_dir", "root_dir", "sub_dir")  # by a logger, without asking its experiment


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
    """Run the module and leave no trace of it.

    Put back bit for bit: modes, buffers, gradients (there are none inside) and frozen parameters, the states of torchmetrics
    and all other attributes, with the contents of those that are tensors, generators, containers or objects of the user's, and
    the random states of Python, numpy and torch (CPU and CUDA) and of generators at the top of files that methods name. Kept
    from happening: logging by ``self.log``, loggers and ``print``.

    Args:
        trainer: The trainer.
        pl_module: Its module. It may be quiet already; then the outer context counts it as quiet until it ends.
        evaluate: Run it in eval mode, and compiled code eagerly; else in the modes in which it is, and as it is compiled.
        check: Read every parameter before and after, to see whether the step changes one. It costs a pass over the weights.
        advice: What to do about a step that does, for the error.
        display_name: Who looks, for the error.

    Raises:
        RuntimeError: If the step has changed a parameter that is trained, or lazy layers have no parameters yet.
    """
    _refuse_lazy(pl_module, display_name)
    parameters = list(pl_module.parameters())
    frozen = sum(p.numel() for p in parameters if not p.requires_grad)
    # A teacher that the step moves is as large as its student; a large frozen base is not worth a copy.
    copied = frozen <= sum(p.numel() for p in parameters if p.requires_grad)
    with ExitStack() as stack:
        stack.enter_context(_parameters_as_they_are(pl_module, check, copied, advice, display_name))
        stack.enter_context(unseen(trainer, pl_module, copied))
        if evaluate:
            stack.enter_context(eager())
            if torch.backends.cudnn.enabled and any(isinstance(module, nn.RNNBase) for module in pl_module.modules()):
                # It has no backward pass of an RNN in eval mode.
                stack.callback(setattr, torch.backends.cudnn, "enabled", True)
                torch.backends.cudnn.enabled = False
            pl_module.eval()
        if pl_module not in _QUIET:
            _QUIET.add(pl_module)
            stack.callback(_QUIET.discard, pl_module)
        yield


@contextmanager
def unseen(trainer: pl.Trainer, pl_module: pl.LightningModule, copies_frozen: bool = False) -> Iterator[None]:
    """Put back what a module's step changes besides parameters and gradients, and keep it from logging.

    Args:
        trainer: The trainer.
        pl_module: Its module.
        copies_frozen: Whether frozen parameters are put back too.
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
            f"{display_name} cannot run {type(pl_module).__name__} just to look at what it returns while it has lazy "
            f"layers without parameters: {lazy!r} has no size yet. Run the network once on a batch, under "
            "torch.no_grad(), in the module's constructor or before the fit."
        )


@contextmanager
def aside(module: nn.Module) -> Iterator[None]:
    """Run a module in training once more: random streams and buffers are put back, cheaply enough for every step."""
    with random_streams_kept():
        kept = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
        try:
            yield
        finally:
            for buffer, value in kept:
                buffer.data.copy_(value)  # what is in the graph of the step must not count this as a change


@contextmanager
def silence(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[None]:
    """Keep the module from logging, by ``self.log``, by its loggers and by ``self.print``."""

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
    """Run compiled code as it was written."""
    # What is compiled may not trace what looks at it. Without dynamo nothing is, and importing it takes seconds.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


class _Mute:
    """Takes the place of a logger: whatever is called on it or on what it has does nothing. It still says where files go.

    Args:
        logger: The logger.
    """

    def __init__(self, logger: Any = None) -> None:
        self._logger = logger

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        told = getattr(self._logger, name, None) if name in _TOLD else None
        return told if isinstance(told, (str, int, float, Path)) else None if name in _TOLD else _Mute()

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
    parameters = dict(pl_module.named_parameters())
    watched = {name: p for name, p in parameters.items() if p.requires_grad or not copied}
    before = {name: _checksum(p) for name, p in watched.items()} if check else {}
    gradients = {name: p.grad for name, p in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None  # a backward pass would add to it in place
    try:
        yield
    finally:
        for name, gradient in gradients.items():
            parameters[name].grad = gradient
    changed = [name for name, was in before.items() if not torch.equal(was, _checksum(watched[name]))]
    if changed:
        raise RuntimeError(
            f"{display_name} runs training_step just to look at what it returns, and the step changes the parameter "
            f"{changed[0]!r}. Change it in on_train_batch_end{advice}."
        )


def _checksum(parameter: Tensor) -> Tensor:
    value = parameter.detach()
    kind = torch.float32 if value.device.type == "mps" else torch.float64  # half precision would overflow
    size = value.abs()
    total = size if value.is_complex() else value
    return torch.stack([total.sum(dtype=kind), size.sum(dtype=kind)]).nan_to_num()  # a nan equals nothing
