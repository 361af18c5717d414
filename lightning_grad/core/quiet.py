"""Run a module's own steps without a trace. Every technique that inspects the module outside training uses this.

Inside :func:`quiet`, ``training_step`` logs nothing. Afterwards the module, its metrics and the
random streams are bitwise as before. Techniques that act only on training check :func:`is_quiet`.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast
from weakref import WeakSet

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_grad.core.dispatch import WrapOrder, wrap_method
from lightning_grad.core.module_state import Snapshot, buffers_of, parameters_of, put_back
from lightning_grad.core.views.weight_view import close_windows, open_windows
from lightning_grad.data.random_streams import generators_kept, named_generators, random_streams_kept
from lightning_grad.functional.plain_tensors import plain_tensor

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
    modules = list(pl_module.modules())
    parameters = parameters_of(modules)
    _refuse_lazy(pl_module, parameters, display_name)
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    # Frozen parameters are copied if they are no larger than the trained ones: they may be a teacher
    # that the step updates. A copy of a large frozen base model would cost too much memory.
    if frozen and 2 * sum(p.numel() for p in frozen) > sum(p.numel() for p in parameters):
        frozen = []
    with ExitStack() as stack:
        if check:
            stack.enter_context(_parameters_checked(pl_module, frozen, advice, display_name))
        stack.enter_context(_gradients_hidden(parameters))
        stack.enter_context(_unseen(trainer, modules, frozen))
        if evaluate:
            stack.enter_context(eager())
            if torch.backends.cudnn.enabled and any(isinstance(module, nn.RNNBase) for module in modules):
                # cuDNN has no backward pass for an RNN in eval mode.
                stack.callback(setattr, torch.backends.cudnn, "enabled", True)
                torch.backends.cudnn.enabled = False
            pl_module.eval()
        if pl_module not in _QUIET:
            _QUIET.add(pl_module)
            stack.callback(_QUIET.discard, pl_module)
        yield


@contextmanager
def unseen(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[None]:
    """Restore what a module's step changes except parameters and gradients, and mute its logs."""
    with _unseen(trainer, list(pl_module.modules()), ()):
        yield


@contextmanager
def _unseen(trainer: pl.Trainer, modules: Sequence[nn.Module], frozen: Sequence[nn.Parameter]) -> Iterator[None]:
    pl_module = cast(pl.LightningModule, modules[0])
    with ExitStack() as stack:
        stack.enter_context(random_streams_kept())
        stack.enter_context(generators_kept(named_generators(map(type, modules))))
        stack.enter_context(_silence(trainer, modules))
        stack.callback(Snapshot(modules, frozen).restore)
        stack.callback(close_windows, pl_module, open_windows(pl_module))
        yield


def _refuse_lazy(pl_module: pl.LightningModule, parameters: Sequence[nn.Parameter], display_name: str) -> None:
    if any(map(is_lazy, parameters)):
        lazy = next(name for name, p in pl_module.named_parameters() if is_lazy(p))
        raise RuntimeError(
            f"{display_name} cannot run {type(pl_module).__name__} outside training while lazy layers have no "
            f"parameters: {lazy!r} has no size yet. Run the network once on a batch, under torch.no_grad(), in the "
            "module's constructor or before the fit."
        )


@contextmanager
def aside(module: nn.Module) -> Iterator[None]:
    """Restore random streams and buffers after an extra run of a module in training; cheap enough for every step."""
    with random_streams_kept():
        buffers = buffers_of(list(module.modules()))
        kept = [buffer.detach().clone() for buffer in buffers]
        try:
            yield
        finally:
            # .data: autograd must not see a change of a buffer that the step's graph uses
            put_back([(buffer.data, value) for buffer, value in zip(buffers, kept, strict=True)])


@contextmanager
def _silence(trainer: pl.Trainer, modules: Sequence[nn.Module]) -> Iterator[None]:
    """Mute ``self.log``, ``self.log_dict``, ``self.print`` and the loggers of the modules."""

    def nothing(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        return None

    kinds = {kind for kind in set(map(type, modules)) if hasattr(kind, "log_dict")}
    loud = [module for module in modules if type(module) in kinds or "log_dict" in vars(module)]
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
def _gradients_hidden(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let parameters have no gradients inside, and restore them afterwards."""
    gradients = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None  # a backward pass would add to the gradient in place
    try:
        yield
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient


@contextmanager
def _parameters_checked(
    pl_module: pl.LightningModule, restored: Sequence[nn.Parameter], advice: str, display_name: str
) -> Iterator[None]:
    """Raise if a parameter changed that is not restored."""
    known = set(map(id, restored))
    watched = {name: p for name, p in pl_module.named_parameters() if id(p) not in known}
    before = {name: _checksum(p) for name, p in watched.items()}
    yield
    changed = [name for name, was in before.items() if not torch.equal(was, _checksum(watched[name]))]
    if changed:
        raise RuntimeError(
            f"{display_name} runs training_step without training, but the step changes the parameter {changed[0]!r}. "
            f"Change it in on_train_batch_end{advice}."
        )


def _checksum(parameter: Tensor) -> Tensor:
    value = plain_tensor(parameter.detach())
    kind = torch.float32 if value.device.type == "mps" else torch.float64  # half precision would overflow
    size = value.abs()
    total = size if value.is_complex() else value
    return torch.stack([total.sum(dtype=kind), size.sum(dtype=kind)]).nan_to_num()  # nan would not equal itself
