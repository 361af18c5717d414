"""Copies of batches that share nothing with the batch that a step could change.

A step may normalise its input in place, pop its labels, sort a list, draw on an image. So a batch that is needed again is
copied before a step gets it.
"""

import copy
from collections import deque
from collections.abc import Iterator, Mapping, MutableMapping
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_grad.functional.plain_tensors import attributes_of, clone_of

DEEPEST = 8  # an object of a batch may know its owner
FIXED = frozenset({bool, int, float, complex, str, bytes, type(None)})
_NO_PARTS = (type, ModuleType, torch.nn.Module)
_FRAMEWORKS = {"lightning", "lightning_fabric", "pytorch_lightning"}
_COPIED_WHOLE = {"PIL", "pandas", "polars", "scipy"}  # what they are made of is their own affair


def copy_of(batch: Any, leaves_in_graph: bool = False) -> Any:
    """Return a batch whose containers, tensors and arrays are its own, however deep they are.

    What stands in it twice stands twice in the copy. Tensors keep their class, their attributes and their graph. Modules, data
    sets, and objects that cannot be copied are shared.

    Args:
        batch: The batch.
        leaves_in_graph: Copy leaves that require a gradient into their own graph; by default their copies are leaves too.

    Example:
        >>> batch = {"x": torch.zeros(1), "meta": {"ids": [1, 2]}}
        >>> other = copy_of(batch)
        >>> other["x"].add_(1), other["meta"].pop("ids"), batch
        (tensor([1.]), [1, 2], {'x': tensor([0.]), 'meta': {'ids': [1, 2]}})
    """
    return _Copies(leaves_in_graph).of(batch)


class _Copies:
    """What has been copied, by identity."""

    def __init__(self, leaves_in_graph: bool) -> None:
        self._leaves_in_graph = leaves_in_graph
        self._known: dict[int, tuple[Any, Any]] = {}  # the original too, so that no other gets its identity
        self._twins: set[int] = set()

    def of(self, value: Any, depth: int = 0) -> Any:
        if type(value) in FIXED or id(value) in self._twins or depth > DEEPEST or _is_left_alone(value):
            return value
        if id(value) not in self._known:
            self._known[id(value)] = (self._begun(value, depth), value)
            twin = self._known[id(value)][0]
            self._twins.add(id(twin))
            is_done = isinstance(value, (Tensor, tuple, np.ndarray)) or _package_of(value) in _COPIED_WHOLE
            if twin is not value and not is_done:
                self._fill(twin, {id(child) for _, child in children(value)}, depth + 1)
        return self._known[id(value)][0]

    def _begun(self, value: Any, depth: int) -> Any:
        """Return a copy; of what is in a mutable container, not yet, as that may hold itself."""
        if isinstance(value, Tensor):
            return clone_of(value, lambda attribute: self.of(attribute, depth + 1), self._leaves_in_graph)
        if isinstance(value, tuple):
            items = [self.of(item, depth + 1) for item in value]
            changed = any(new is not old for new, old in zip(items, value, strict=True))
            return value if not changed else type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if not (isinstance(value, (list, dict, set, deque, np.ndarray, Mapping)) or has_parts(value)):
            return value
        try:
            return copy.deepcopy(value) if _package_of(value) in _COPIED_WHOLE else shallow_copy(value)
        except Exception:  # an object that cannot be copied is shared
            return value

    def _fill(self, twin: Any, shared: set[int], depth: int) -> None:
        """Put copies of its own where a shallow copy still has what the original has."""
        for key, child in list(children(twin)):
            if id(child) in shared:
                own = self.of(child, depth)
                if own is not child:
                    put(twin, key, own)
            elif has_parts(child) and depth <= DEEPEST:  # a class that copies some of its parts by itself
                self._fill(child, {id(part) for _, part in children(child)}, depth + 1)


def children(batch: Any) -> Iterator[tuple[Any, Any]]:
    """Return the parts of a container or object, with their keys, positions or names."""
    if isinstance(batch, Mapping):
        yield from batch.items()
    elif isinstance(batch, (list, tuple, deque)):
        yield from enumerate(batch)
    elif isinstance(batch, Tensor):
        return
    elif not isinstance(batch, _NO_PARTS):
        yield from attributes_of(batch).items()


def has_parts(value: Any) -> bool:
    """Return whether something is a container, or an object with attributes, but no tensor."""
    return next(children(value), None) is not None


def put(holder: Any, key: Any, value: Any) -> None:
    """Give a container or object another part."""
    if isinstance(holder, (list, deque, MutableMapping)):
        holder[key] = value
    else:
        object.__setattr__(holder, key, value)  # a dataclass may be frozen


def shallow_copy(batch: Any) -> Any:
    """Copy a container or object, but not what is in it."""
    other = copy.copy(batch)
    if isinstance(other, MutableMapping) and not isinstance(other, dict) and hasattr(other, "__dict__"):
        # What a mapping keeps its entries in must not be shared either.
        for name, value in vars(other).items():
            if isinstance(value, MutableMapping) and value is vars(batch).get(name):
                vars(other)[name] = copy.copy(value)
    return other


def _package_of(value: Any) -> str:
    return str(type(value).__module__).partition(".")[0]


def _is_left_alone(value: Any) -> bool:
    return _package_of(value) in _FRAMEWORKS or isinstance(value, (*_NO_PARTS, Dataset, DataLoader))
