"""What a module keeps from step to step, held a second time, so that it can be run on other inputs beside the real ones.

Metrics, buffers and plain attributes (numbers, tensors, lists of outputs) are exchanged; parameters and submodules are the
same. Unlike in ``quiet``, what has happened in the second state stays there until it is used again.
"""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_grad.callbacks._quiet import is_record, put_back

_METRICS = (Metric, MetricCollection)
_COPIED = (*_METRICS, np.ndarray, np.random.Generator, np.random.RandomState, random.Random)
_HYPERPARAMETERS = ("_hparams", "_hparams_initial", "_hparams_name")


class SecondState:
    """A copy of the state that a module has now, to be used beside its own.

    Args:
        pl_module: The module.
    """

    def __init__(self, pl_module: pl.LightningModule) -> None:
        internal = {*vars(pl.LightningModule()), *_HYPERPARAMETERS}
        memo: dict[int, Any] = {}
        with torch.inference_mode(False), torch.no_grad():
            self._parts = [_Part(module, internal, memo) for module in _outside_metrics(pl_module)]

    @contextmanager
    def used(self) -> Iterator[None]:
        """Let the module have this state, and afterwards its own again."""
        for part in self._parts:
            part.swap()
        try:
            yield
        finally:
            for part in self._parts:
                part.swap()


class _Part:
    """The state of one module, without its submodules'."""

    def __init__(self, module: nn.Module, internal: set[str], memo: dict[int, Any]) -> None:
        self._module = module
        self._internal = internal
        children = module._modules.items()
        self._metrics = {name: _twin(child, memo) for name, child in children if isinstance(child, _METRICS)}
        self._attributes = {name: _twin(value, memo) for name, value in self._own().items()}
        self._buffers = {name: b.detach().clone() for name, b in module._buffers.items() if b is not None}

    def _own(self) -> dict[str, Any]:
        # Methods that are wrapped on the instance are callable, and stay.
        attributes = vars(self._module).items()
        return {name: value for name, value in attributes if name not in self._internal and not callable(value)}

    def swap(self) -> None:
        """Exchange this state and the module's."""
        module = self._module
        metrics = {name: module._modules[name] for name in self._metrics}
        module._modules.update(self._metrics)
        attributes = self._own()
        for name in attributes.keys() - self._attributes.keys():
            del vars(module)[name]
        vars(module).update(self._attributes)
        self._metrics, self._attributes = metrics, attributes
        for name, other in self._buffers.items():
            buffer = module._buffers[name]
            if buffer is not None and buffer.shape == other.shape:  # the same object: compiled code looks at it
                held = buffer.detach().clone()
                put_back(buffer, other)
                put_back(other, held)


def _outside_metrics(module: nn.Module) -> Iterator[nn.Module]:
    yield module
    for child in module.children():
        if not isinstance(child, _METRICS):
            yield from _outside_metrics(child)


def _twin(value: Any, memo: dict[int, Any]) -> Any:
    """Return a copy of what a step may change; what is known twice stays one thing, all else is shared."""
    if id(value) not in memo:
        memo[id(value)] = _copied(value, memo)
    return memo[id(value)]


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, _COPIED):
        return copy.deepcopy(value, memo)
    if isinstance(value, torch.Generator):
        twin = torch.Generator(value.device)
        twin.set_state(value.get_state())
        return twin
    if isinstance(value, tuple):
        items = [_twin(item, memo) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, (list, dict, set, deque)) or is_record(value):
        return _filled(copy.copy(value), memo)
    return value


def _filled(container: Any, memo: dict[int, Any]) -> Any:
    if isinstance(container, set):
        return container
    if isinstance(container, (list, deque)):
        for position, item in enumerate(container):
            container[position] = _twin(item, memo)
    else:
        items = container if isinstance(container, dict) else vars(container)
        items.update({key: _twin(item, memo) for key, item in items.items()})
    return container
