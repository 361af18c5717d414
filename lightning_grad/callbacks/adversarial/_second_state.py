"""What a module keeps from step to step, held a second time, so that it can be run on other inputs beside the real ones.

Metrics, buffers and plain attributes (numbers, tensors, lists of outputs) are exchanged; parameters and submodules are the
same. Unlike in ``quiet``, what has happened in the second state stays there until it is used again.
"""

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_grad.core.module_state import CONTAINERS, has_own_state, holds_fixed_only, is_code, items_of, put_back
from lightning_grad.functional.plain_tensors import dressed, plain_tensor

_METRICS = (Metric, MetricCollection)
_COPIED = (np.ndarray, np.random.Generator, np.random.RandomState, random.Random)
_HYPERPARAMETERS = ("_hparams", "_hparams_initial", "_hparams_name")
_OURS = "_lightning_grad"  # what techniques keep on a module, such as views of its weights


class SecondState:
    """A copy of the state that a module has now, to be used beside its own.

    Args:
        pl_module: The module.
    """

    def __init__(self, pl_module: pl.LightningModule) -> None:
        internal = {*vars(pl.LightningModule()), *_HYPERPARAMETERS}
        modules = list(_outside_metrics(pl_module, set()))
        # An LSTM has its weights in a list too. They are the same, and so is a buffer: its contents are exchanged.
        same = [*pl_module.parameters(), *(b for module in modules for b in module._buffers.values() if b is not None)]
        memo: dict[int, Any] = {id(tensor): tensor for tensor in same}
        with torch.inference_mode(False), torch.no_grad():
            self._parts = [_Part(module, internal, memo) for module in modules]

    @contextmanager
    def used(self) -> Iterator[None]:
        """Let the module have this state, and afterwards its own again."""
        for part in self._parts:
            part.enter()
        try:
            yield
        finally:
            for part in reversed(self._parts):  # a buffer that two modules share is exchanged twice
                part.leave()

    def take_buffers(self) -> None:
        """Copy the buffers anew, from those that the module has by now."""
        for part in self._parts:
            part.take_buffers()


class _Part:
    """The state of one module, without its submodules'."""

    def __init__(self, module: nn.Module, internal: set[str], memo: dict[int, Any]) -> None:
        self._module = module
        self._internal = internal
        self._metrics = {name: _twin(metric, memo) for name, metric in self._own_metrics().items()}
        self._attributes = {name: _twin(value, memo) for name, value in self._own().items()}
        self.take_buffers()

    def take_buffers(self) -> None:
        """Copy the buffers."""
        self._buffers = self._copied_buffers()

    def _copied_buffers(self) -> dict[str, Tensor | None]:
        return {name: None if b is None else _clone(b) for name, b in self._module._buffers.items()}

    def _own(self) -> dict[str, Any]:
        # Methods that are wrapped on the instance stay.
        attributes, internal = vars(self._module).items(), self._internal
        return {k: v for k, v in attributes if k not in internal and not k.startswith(_OURS) and not is_code(v)}

    def _own_metrics(self) -> dict[str, Any]:
        return {name: child for name, child in self._module._modules.items() if isinstance(child, _METRICS)}

    def enter(self) -> None:
        """Give the module this state, and keep its own."""
        self._exchange()
        buffers = self._module._buffers
        self._lent, self._contents = dict(buffers), self._copied_buffers()
        for name, other in self._buffers.items():
            own = buffers.get(name)
            if own is not None and other is not None and _alike(own, other):  # compiled code looks at the object
                put_back([(own, other)])
            else:
                buffers[name] = other
        for name in buffers.keys() - self._buffers.keys():
            del buffers[name]

    def leave(self) -> None:
        """Give the module its own state back, and keep this one."""
        self._exchange()
        self.take_buffers()
        self._module._buffers.clear()
        self._module._buffers.update(self._lent)
        pairs = ((own, self._contents[name]) for name, own in self._lent.items())
        put_back([(own, content) for own, content in pairs if own is not None and content is not None])

    def _exchange(self) -> None:
        self._metrics = _exchanged(self._module._modules, self._own_metrics(), self._metrics)
        self._attributes = _exchanged(vars(self._module), self._own(), self._attributes)


def _exchanged(holder: dict[str, Any], own: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    for name in own.keys() - others.keys():
        del holder[name]
    holder.update(others)
    return own


def _outside_metrics(module: nn.Module, seen: set[nn.Module]) -> Iterator[nn.Module]:
    if module not in seen and not isinstance(module, _METRICS):
        seen.add(module)
        yield module
        for child in module.children():
            yield from _outside_metrics(child, seen)


def _clone(tensor: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():  # with an inference tensor nothing could be attacked
        return dressed(plain_tensor(tensor).detach().clone(), tensor)


def _alike(one: Tensor, other: Tensor) -> bool:
    same = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
    return same and not one.is_inference() and not other.is_inference()


def _twin(value: Any, memo: dict[int, Any]) -> Any:
    """Return a copy of what a step may change; what is known twice stays one thing, all else is shared.

    Args:
        value: The value.
        memo: What stands for an object in the copy, by the object's identity; it is filled.
    """
    _decide(value, memo, set())
    return copy.deepcopy(value, memo)


def _decide(value: Any, memo: dict[int, Any], seen: set[int]) -> None:
    """Note for all that a value leads to what stands for it, where that is not what ``deepcopy`` would make of it."""
    if id(value) in memo or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        memo[id(value)] = value if isinstance(value, nn.Parameter) else _clone(value)
    elif isinstance(value, torch.Generator):
        memo[id(value)] = torch.Generator(value.device).set_state(value.get_state())
    elif isinstance(value, _METRICS):  # networks in it share their weights
        seen.update(map(id, value.modules()))
        for part in (part for module in value.modules() for part in vars(module).values()):
            _decide(part, memo, seen)
    elif isinstance(value, set) or (isinstance(value, CONTAINERS) and holds_fixed_only(value)):
        memo[id(value)] = copy.copy(value)
    elif isinstance(value, (*CONTAINERS, tuple)) or (has_own_state(value) and _can_be_copied(value)):
        memo.update({id(key): key for key in value} if isinstance(value, dict) else {})
        for part in items_of(value):
            _decide(part, memo, seen)
    elif not isinstance(value, _COPIED):
        memo[id(value)] = value


def _can_be_copied(value: Any) -> bool:
    try:
        return copy.copy(value) is not value
    except Exception:
        return False
