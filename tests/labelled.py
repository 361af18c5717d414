"""Tensors that know what their columns are called, as libraries for physics, medicine and vision have them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

_ARITHMETIC = {"add", "sub", "mul", "div", "where", "cat", "stack", "clamp", "sign", "index_copy", "__getitem__"}


class Labelled(Tensor):
    """Keeps its labels in copies and conversions, and loses them in all else."""

    @staticmethod
    def __new__(cls, values: Tensor, labels: list[str]) -> Any:
        return Tensor.as_subclass(values, cls)

    def __init__(self, values: Tensor, labels: list[str]) -> None:
        self._labels = list(labels)

    @property
    def labels(self) -> list[str]:
        """The name of each column; an AttributeError if it has none."""
        return self._labels

    def clone(self, *args: Any, **kwargs: Any) -> Any:
        return self._kept(Tensor.as_subclass(self, Tensor).clone(*args, **kwargs))

    def detach(self) -> Any:
        return self._kept(Tensor.as_subclass(self, Tensor).detach())

    def to(self, *args: Any, **kwargs: Any) -> Any:
        if args and args[0] == self.device:
            return self
        return self._kept(Tensor.as_subclass(self, Tensor).to(*args, **kwargs))

    def _kept(self, values: Tensor) -> Any:
        other = Tensor.as_subclass(values, type(self))
        if hasattr(self, "_labels"):
            other._labels = list(self._labels)
        return other

    def values_of(self, names: list[str]) -> Tensor:
        """Return the columns of these names, as a plain tensor."""
        return Tensor.as_subclass(self, Tensor)[..., [self.labels.index(name) for name in names]]


class Demanding(Labelled):
    """Its arithmetic needs labels, and what it gives has none."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__.strip("_") in {name.strip("_") for name in _ARITHMETIC}:
            for value in args:
                if isinstance(value, Demanding):
                    value.labels  # noqa: B018
        return super().__torch_function__(func, types, args, kwargs or {})


class Fussy(Labelled):
    """Cannot be copied or detached without labels."""

    def _kept(self, values: Tensor) -> Any:
        return type(self)(values, self.labels)


class Losing(Labelled):
    """Loses its labels in copies too."""

    def _kept(self, values: Tensor) -> Any:
        return Tensor.as_subclass(values, type(self))


class Slotted(Labelled):
    """Keeps a domain in a slot."""

    __slots__ = ("domain",)

    def _kept(self, values: Tensor) -> Any:
        other = super()._kept(values)
        if hasattr(self, "domain"):
            other.domain = self.domain
        return other


KINDS: dict[str, type] = {
    "labelled": Labelled,
    "demanding": Demanding,
    "fussy": Fussy,
    "losing": Losing,
    "slotted": Slotted,
}


def labelled(kind: str, values: Tensor) -> Any:
    """Return a tensor of a kind whose columns have names."""
    tensor = KINDS[kind](values, [f"c{number}" for number in range(values.shape[-1])])
    if kind == "slotted":
        tensor.domain = "unit"
    return tensor
