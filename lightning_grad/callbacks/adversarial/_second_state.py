"""A second copy of a module's state, so that the module can also run on other inputs without affecting its real run.

Metrics, buffers and plain attributes (numbers, tensors, lists of outputs) are swapped; parameters and submodules are
shared. ``quiet`` discards changes; here the second state keeps them for its next use.
"""

import copy
import random
from collections.abc import Iterator, Sequence
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
_OURS = "_lightning_grad"  # prefix of attributes that techniques set on a module, such as views of its weights


class SecondState:
    """A copy of the current state of a module.

    Swapping all state in and out is the only way to run the module's own code twice per batch with separate
    metrics and output lists: the code reads them by attribute name from the module itself.

    Args:
        pl_module: The module.
    """

    def __init__(self, pl_module: pl.LightningModule) -> None:
        internal = {*vars(pl.LightningModule()), *_HYPERPARAMETERS}
        modules = list(_outside_metrics(pl_module, set()))
        # Attributes may also refer to weights and buffers, such as the list of weights of an LSTM. Do not copy these:
        # weights are shared, and buffers swap their contents.
        same = [*pl_module.parameters(), *(b for module in modules for b in module._buffers.values() if b is not None)]
        memo: dict[int, Any] = {id(tensor): tensor for tensor in same}
        with torch.inference_mode(False), torch.no_grad():
            self._parts = [_Part(module, internal, memo) for module in modules]
        self._buffers = _Buffers(modules)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Return a context in which the module has this state; afterwards it has its own again."""
        for part in self._parts:
            part.exchange()
        self._buffers.enter()
        try:
            yield
        finally:
            for part in self._parts:
                part.exchange()
            self._buffers.leave()

    def take_buffers(self) -> None:
        """Replace the copied buffers with copies of the module's current ones."""
        self._buffers.take()


class _Part:
    """The state of one module without its submodules and buffers."""

    def __init__(self, module: nn.Module, internal: set[str], memo: dict[int, Any]) -> None:
        self._module = module
        self._internal = internal
        self._metrics = {name: _twin(metric, memo) for name, metric in self._own_metrics().items()}
        self._attributes = {name: _twin(value, memo) for name, value in self._own().items()}

    def _own(self) -> dict[str, Any]:
        # Keep code: methods may be wrapped on the instance.
        attributes, internal = vars(self._module).items(), self._internal
        return {k: v for k, v in attributes if k not in internal and not k.startswith(_OURS) and not is_code(v)}

    def _own_metrics(self) -> dict[str, Any]:
        return {name: child for name, child in self._module._modules.items() if isinstance(child, _METRICS)}

    def exchange(self) -> None:
        """Swap this state and the module's."""
        self._metrics = _exchanged(self._module._modules, self._own_metrics(), self._metrics)
        self._attributes = _exchanged(vars(self._module), self._own(), self._attributes)


class _Buffers:
    """A second copy of the buffers of modules. All are copied at once, because this happens several times a batch."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        self.take()

    def take(self) -> None:
        """Copy the buffers."""
        self._copies = _copied_buffers(self._modules)

    def enter(self) -> None:
        """Put the copies into the modules."""
        self._lent, self._contents = [dict(module._buffers) for module in self._modules], _copied_buffers(self._modules)
        pairs = []
        for module, copies in zip(self._modules, self._copies, strict=True):
            buffers = module._buffers
            for name, other in copies.items():
                own = buffers.get(name)
                # Copy into the same tensor where possible: compiled code holds a reference to it.
                if own is not None and other is not None and _alike(own, other):
                    pairs.append((own, other))
                else:
                    buffers[name] = other
            for name in buffers.keys() - copies.keys():
                del buffers[name]
        put_back(pairs)

    def leave(self) -> None:
        """Store copies of what the buffers are now, and restore what they were."""
        self.take()
        pairs = []
        for module, lent, contents in zip(self._modules, self._lent, self._contents, strict=True):
            module._buffers.clear()
            module._buffers.update(lent)
            pairs += [(own, contents[name]) for name, own in lent.items()]
        put_back([(own, content) for own, content in pairs if own is not None and content is not None])


def _copied_buffers(modules: Sequence[nn.Module]) -> list[dict[str, Tensor | None]]:
    with torch.inference_mode(False), torch.no_grad():  # an attack cannot differentiate through inference tensors
        return [{name: None if b is None else _clone(b) for name, b in module._buffers.items()} for module in modules]


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
    return dressed(plain_tensor(tensor).detach().clone(), tensor)


def _alike(one: Tensor, other: Tensor) -> bool:
    same = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
    return same and not one.is_inference() and not other.is_inference()


def _twin(value: Any, memo: dict[int, Any]) -> Any:
    """Return a copy of everything in a value that a step may change; the rest is shared.

    References to the same object stay references to one copy.

    Args:
        value: The value.
        memo: Copies by the id of their original, as in ``copy.deepcopy``; new ones are added.
    """
    _decide(value, memo, set())
    return copy.deepcopy(value, memo)


def _decide(value: Any, memo: dict[int, Any], seen: set[int]) -> None:
    """Add to ``memo`` what replaces each object in a value for which the default of ``deepcopy`` is wrong."""
    if id(value) in memo or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        memo[id(value)] = value if isinstance(value, nn.Parameter) else _clone(value)
    elif isinstance(value, torch.Generator):
        memo[id(value)] = torch.Generator(value.device).set_state(value.get_state())
    elif isinstance(value, _METRICS):  # copy the metric, but share the weights of networks inside it
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
