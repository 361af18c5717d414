"""Running a module's own steps without leaving a trace: what all that look at a module outside its training share.

Inside :func:`quiet` a ``training_step`` logs nothing, counts nothing and moves no random stream; afterwards module, metrics
and random streams are bitwise what they were. Techniques that act on training only ask :func:`is_quiet`.
"""

from __future__ import annotations

import copy
import logging
import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from enum import Enum
from types import FunctionType, ModuleType
from typing import Any, cast
from weakref import WeakSet

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_grad.utilities.dispatch import wrap_method
from lightning_grad.utilities.weight_view import close_windows, open_windows

_QUIET: WeakSet[nn.Module] = WeakSet()
_NUMBERS = (bool, int, float, complex, str, bytes, type(None))
_CONTAINERS = (list, dict, set, deque)
_DICTIONARIES = (dict, OrderedDict)
_ARRAYS = (Tensor, np.ndarray)
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_SHARED = (nn.Module, ModuleType, Enum, Dataset, DataLoader, logging.Logger)  # which no step keeps its own state in
_FEW = 100  # data sets or transforms in a list; the samples themselves are more
_OF_MODULES = ("_parameters", "_buffers", "_modules", "_trainer", "_fabric")


def is_quiet(pl_module: nn.Module) -> bool:
    """Say whether the module's step runs for somebody who only looks, so that it is no step of the training."""
    return pl_module in _QUIET


@contextmanager
def quiet(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    evaluate: bool = True,
    check: bool = True,
    advice: str = "",
) -> Iterator[None]:
    """Let the module be run, and leave no trace of it.

    Put back bit for bit: modes, buffers, gradients (there are none inside) and frozen parameters, the states of torchmetrics
    and all other attributes, with the contents of those that are tensors, generators, containers or small objects, the random
    states of Python, numpy and torch. Kept from happening: logging by ``self.log``, loggers and ``print``.

    Args:
        trainer: The trainer.
        pl_module: Its module. It may be quiet already; then the outer context counts it as quiet until it ends.
        evaluate: Run it in eval mode, and compiled code eagerly; else in the modes in which it is, and as it is compiled.
        check: Read every parameter before and after, to see whether the step changes one. It costs a pass over the weights.
        advice: What to do about a step that does, for the error.

    Raises:
        RuntimeError: If the step has changed a parameter that is trained.
    """
    with ExitStack() as stack:
        stack.enter_context(random_streams_kept())
        stack.enter_context(_silence(trainer, pl_module))
        stack.enter_context(_modules_as_they_are(pl_module, check, advice))
        if evaluate:
            stack.enter_context(_eager())
            stack.enter_context(_recurrent_layers_have_gradients(pl_module))
            pl_module.eval()
        if pl_module not in _QUIET:
            _QUIET.add(pl_module)
            stack.callback(_QUIET.discard, pl_module)
        stack.callback(close_windows, pl_module, open_windows(pl_module))
        yield


@contextmanager
def generators_kept(holder: Any) -> Iterator[None]:
    """Put back the state of random generators that a data set, or what it is made of, has of its own."""
    held = [_Held(generator, set()) for generator in _generators_of(holder)]
    try:
        yield
    finally:
        for generator in held:
            generator.restored()


def _generators_of(holder: Any, depth: int = 4) -> Iterator[Any]:
    if isinstance(holder, _GENERATORS):
        yield holder
    elif isinstance(holder, (list, tuple)) and len(holder) <= _FEW and depth:
        for item in holder:
            yield from _generators_of(item, depth - 1)
    elif hasattr(holder, "__dict__") and not isinstance(holder, (type, ModuleType)) and depth:
        for item in vars(holder).values():
            yield from _generators_of(item, depth - 1)


@contextmanager
def random_streams_kept() -> Iterator[None]:
    """Put back the states of the global generators of Python, numpy and torch, on every device in use."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def _silence(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[None]:
    def nothing(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        return None

    loud = [module for module in pl_module.modules() if hasattr(module, "log_dict")]
    undo = [
        wrap_method(module, name, nothing, priority=1000) for module in loud for name in ("log", "log_dict", "print")
    ]
    try:
        with loggers_muted(trainer):
            yield
    finally:
        for step in undo:
            step()


@contextmanager
def loggers_muted(trainer: pl.Trainer) -> Iterator[None]:
    """Let whatever is done with the loggers do nothing; ``self.log`` is none of them."""
    loggers = trainer.loggers
    trainer.loggers = [cast(Any, _Mute()) for _ in loggers]
    try:
        yield
    finally:
        trainer.loggers = loggers


@contextmanager
def _eager() -> Iterator[None]:
    # What is compiled may not trace what looks at it. Without dynamo nothing is, and importing it takes seconds.
    if "torch._dynamo" in sys.modules:
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


@contextmanager
def _recurrent_layers_have_gradients(pl_module: nn.Module) -> Iterator[None]:
    # cuDNN has no backward pass of an RNN in eval mode.
    cudnn = torch.backends.cudnn
    if not any(isinstance(module, nn.RNNBase) for module in pl_module.modules()) or not cudnn.enabled:
        yield
        return
    cudnn.enabled = False
    try:
        yield
    finally:
        cudnn.enabled = True


class _Mute:
    """Takes the place of a logger: whatever is called on it or on what it has does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Mute()

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        return None


@contextmanager
def _modules_as_they_are(pl_module: pl.LightningModule, check: bool, advice: str) -> Iterator[None]:
    parameters = dict(pl_module.named_parameters())
    frozen = sum(p.numel() for p in parameters.values() if not p.requires_grad)
    # A teacher that the step moves is as large as its student; a large frozen base is not worth a copy.
    copied = frozen <= sum(p.numel() for p in parameters.values() if p.requires_grad)
    snapshots = [_Snapshot(module, copied) for module in pl_module.modules()]
    watched = {name: p for name, p in parameters.items() if p.requires_grad or not copied}
    before = {name: _checksum(p) for name, p in watched.items()} if check else {}
    gradients = {name: p.grad for name, p in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None  # a backward pass would add to it in place
    try:
        yield
    finally:
        for snapshot in snapshots:
            snapshot.restore()
        for name, gradient in gradients.items():
            parameters[name].grad = gradient
    changed = [name for name, was in before.items() if not torch.equal(was, _checksum(watched[name]))]
    if changed:
        raise RuntimeError(
            f"training_step changes the parameter {changed[0]!r}, so that it cannot be run just to look at what it returns. "
            f"Change it in on_train_batch_end{advice}."
        )


def _checksum(parameter: Tensor) -> Tensor:
    value = parameter.detach()
    kind = torch.float32 if value.device.type == "mps" else torch.float64  # half precision would overflow
    size = value.abs()
    total = size if value.is_complex() else value
    return torch.stack([total.sum(dtype=kind), size.sum(dtype=kind)]).nan_to_num()  # a nan equals nothing


class _Snapshot:
    """What one module holds besides submodules and trained parameters."""

    def __init__(self, module: nn.Module, copies_frozen: bool) -> None:
        self._module = module
        self._training = module.training
        frozen = [p for p in module._parameters.values() if p is not None and not p.requires_grad and copies_frozen]
        buffers = [buffer for buffer in module._buffers.values() if buffer is not None]
        self._tensors = [(tensor, tensor.detach().clone()) for tensor in (*buffers, *frozen)]
        self._buffers = dict(module._buffers)
        self._attributes = {name: value for name, value in module.__dict__.items() if name not in _OF_MODULES}
        # Every module has a dozen empty dictionaries; to empty them again is quicker than to copy them.
        self._empty = [value for value in self._attributes.values() if type(value) in _DICTIONARIES and not value]
        known = set(map(id, self._empty))
        put_aside = [_put_aside(value, known) for value in self._attributes.values()]
        self._held = [held for held in put_aside if isinstance(held, _Held)]
        self._names = set(module.__dict__)

    def restore(self) -> None:
        module = self._module
        put_back(self._tensors)
        module._buffers.clear()
        module._buffers.update(self._buffers)
        for name in [name for name in module.__dict__ if name not in self._names]:
            del module.__dict__[name]
        module.__dict__.update(self._attributes)
        for held in self._held:
            held.restored()
        for container in self._empty:
            container.clear()
        module.training = self._training


def put_back(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Give each first tensor the content of the second, in its own mode: only inference may change an inference tensor."""
    normal = [pair for pair in pairs if not pair[0].is_inference()]
    others = [pair for pair in pairs if pair[0].is_inference()]
    for mode, chosen in ((False, normal), (True, others)):
        if chosen:
            with torch.inference_mode(mode), torch.no_grad():
                for tensor, value in chosen:
                    tensor.detach().copy_(value)


class _Held:
    """A value, and what it was; the same object is given back, with the same contents.

    Args:
        value: The value.
        known: Identities of what is held already, to which this is added: objects may know each other.
    """

    def __init__(self, value: Any, known: set[int]) -> None:
        known.add(id(value))
        self._value = value
        self._was = _copied(value, known)

    def restored(self) -> Any:
        value, was = self._value, self._was
        if isinstance(value, Tensor):
            put_back([(value, was)])
        elif isinstance(value, np.ndarray):
            value[...] = was
        elif isinstance(value, (torch.Generator, np.random.RandomState)):
            value.set_state(was)
        elif isinstance(value, np.random.Generator):
            value.bit_generator.state = was
        elif isinstance(value, random.Random):
            value.setstate(was)
        elif isinstance(value, tuple):
            for item in was:
                _given_back(item)
        elif isinstance(value, _CONTAINERS):
            value.clear()
            _refill(value, was)
        elif is_record(value):
            value.__dict__.clear()
            _refill(value.__dict__, was)
        return value


def _refill(container: Any, was: Any) -> None:
    if isinstance(container, dict):
        container.update({key: _given_back(item) for key, item in was.items()})
    elif isinstance(container, set):
        container.update(was)
    else:
        container.extend(_given_back(item) for item in was)


def _given_back(item: Any) -> Any:
    return item.restored() if isinstance(item, _Held) else item


def is_record(value: Any, depth: int = 3) -> bool:
    """Say whether an object is a small one of the user's, such as an average meter: all that it has are plain values."""
    if isinstance(value, _SHARED) or callable(value) or not hasattr(value, "__dict__") or not depth:
        return False
    plain = (*_NUMBERS, *_CONTAINERS, tuple, *_GENERATORS, *_ARRAYS)
    return all(isinstance(item, plain) or is_record(item, depth - 1) for item in vars(value).values())


def _copied(value: Any, known: set[int]) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, (torch.Generator, np.random.RandomState)):
        return value.get_state()
    if isinstance(value, np.random.Generator):
        return copy.deepcopy(value.bit_generator.state)
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, set):
        return set(value)
    if isinstance(value, (list, tuple, deque)):
        return [_put_aside(item, known) for item in value]
    if isinstance(value, dict) or is_record(value):
        items = value if isinstance(value, dict) else vars(value)
        return {key: _put_aside(item, known) for key, item in items.items()}
    return value


def _put_aside(item: Any, known: set[int]) -> Any:
    return _Held(item, known) if id(item) not in known and _may_change(item) else item


def _may_change(value: Any) -> bool:
    kind = type(value)
    if kind in _NUMBERS or kind is FunctionType:
        return False
    return isinstance(value, (*_CONTAINERS, tuple, *_GENERATORS, *_ARRAYS)) or is_record(value)
