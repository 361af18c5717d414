"""Copies of batches that a step can change without changing the original.

A step may normalize its input in place, pop labels, sort a list, or draw on an image. A batch that is needed again is
therefore copied first.
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

DEEPEST = 8  # recursion limit, because an object in a batch may refer back to its owner
FIXED = frozenset({bool, int, float, complex, str, bytes, type(None)})
_NO_PARTS = (type, ModuleType, torch.nn.Module)
_FRAMEWORKS = {"lightning", "lightning_fabric", "pytorch_lightning"}
_COPIED_WHOLE = {"PIL", "pandas", "polars", "scipy"}  # packages whose objects are copied by deepcopy


def copy_of(batch: Any, leaves_in_graph: bool = False) -> Any:
    """Copy a batch with all its containers, tensors and arrays, at any depth.

    An object that occurs twice is copied once, and the copy occurs twice. Tensors keep their class, attributes and
    graph. Modules, data sets, and objects that cannot be copied are shared.

    Args:
        batch: The batch.
        leaves_in_graph: Copy leaves that require grad differentiably; by default their copies are leaves.

    Example:
        >>> batch = {"x": torch.zeros(1), "meta": {"ids": [1, 2]}}
        >>> other = copy_of(batch)
        >>> other["x"].add_(1), other["meta"].pop("ids"), batch
        (tensor([1.]), [1, 2], {'x': tensor([0.]), 'meta': {'ids': [1, 2]}})
    """
    return _Copies(leaves_in_graph).of(batch)


class _Copies:
    """The copies made so far, by identity of the original."""

    def __init__(self, leaves_in_graph: bool) -> None:
        self._leaves_in_graph = leaves_in_graph
        self._known: dict[int, tuple[Any, Any]] = {}  # keeps the original alive, so that its id is not reused
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
        """Return a copy. The items of mutable containers are copied later, because a container may contain itself."""
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
        except Exception:  # share objects that cannot be copied
            return value

    def _fill(self, twin: Any, shared: set[int], depth: int) -> None:
        """Replace the parts that a shallow copy still shares with the original by copies."""
        for key, child in list(children(twin)):
            if id(child) in shared:
                own = self.of(child, depth)
                if own is not child:
                    put(twin, key, own)
            elif has_parts(child) and depth <= DEEPEST:  # the class has copied this part itself, perhaps not deeply
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
    """Return True for a non-empty container or an object with attributes, but not for a tensor."""
    return next(children(value), None) is not None


def put(holder: Any, key: Any, value: Any) -> None:
    """Set an item of a container or an attribute of an object."""
    if isinstance(holder, (list, deque, MutableMapping)):
        holder[key] = value
    else:
        object.__setattr__(holder, key, value)  # a dataclass may be frozen


def shallow_copy(batch: Any) -> Any:
    """Copy a container or object, but not its parts."""
    other = copy.copy(batch)
    if isinstance(other, MutableMapping) and not isinstance(other, dict) and hasattr(other, "__dict__"):
        # A custom mapping may store its entries in an inner mapping, which must not be shared either.
        for name, value in vars(other).items():
            if isinstance(value, MutableMapping) and value is vars(batch).get(name):
                vars(other)[name] = copy.copy(value)
    return other


def _package_of(value: Any) -> str:
    return str(type(value).__module__).partition(".")[0]


def _is_left_alone(value: Any) -> bool:
    return _package_of(value) in _FRAMEWORKS or isinstance(value, (*_NO_PARTS, Dataset, DataLoader))
