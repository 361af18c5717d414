"""Attributes that live for one fit: made when first read, dropped when the fit ends or the next one begins.

A technique declares them in its class, so it need not set them to ``None`` and later assert that
they are set:

- :class:`during_fit` is for references into the run (the training set, hooks, tensors of a batch).
  They are dropped when the fit ends for any reason, and are not part of pickles and copies.
- :class:`until_next_fit` is for what is useful after the fit (counts, a record, what a checkpoint
  needs). They are dropped when the next fit begins. With ``.saved()``, checkpoints hold them and a
  resumed fit continues with them.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any, Generic, Self, TypeVar, overload

T = TypeVar("T")
_VALUES = "_fit_values"


class _Attribute(Generic[T]):
    """An attribute whose value is stored in a dictionary of its owner, by lifetime and name.

    Args:
        make: Creates the value from the owner at the first read. Without it, the owner must set the
            value first.
    """

    lifetime: str

    def __init__(self, make: Callable[[Any], T] | None = None) -> None:
        self._make = make
        self.__doc__ = make.__doc__

    @classmethod
    def of(cls, make: Callable[[], T]) -> Self:
        """Return an attribute that starts as ``make()``, for example ``during_fit.of(list[int])``."""
        return cls(lambda _: make())

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...

    @overload
    def __get__(self, instance: object, owner: type) -> T: ...

    def __get__(self, instance: object | None, owner: type) -> Self | T:
        if instance is None:
            return self
        values = _values(instance, self.lifetime)
        if self._name not in values:
            if self._make is None:
                raise AttributeError(f"{owner.__name__}.{self._name} exists only during a fit, after it is set.")
            values[self._name] = self._make(instance)
        return values[self._name]  # type: ignore[no-any-return]

    def __set__(self, instance: object, value: T) -> None:
        _values(instance, self.lifetime)[self._name] = value


class during_fit(_Attribute[T]):  # noqa: N801  (used like property)
    """An attribute that is dropped when the fit ends for any reason, and is never pickled or copied.

    Example:
        >>> class Counter(FitScope):
        ...     seen = during_fit.of(int)
        ...
        ...     @during_fit
        ...     def started_at(self) -> int:
        ...         return self.seen
        >>> counter = Counter()
        >>> counter.seen += 2
        >>> counter.seen, counter.started_at
        (2, 2)
        >>> counter.end_fit()
        >>> counter.seen
        0
    """

    lifetime = "during"


class until_next_fit(_Attribute[T]):  # noqa: N801
    """An attribute that is dropped when a fit begins, and is kept after the fit ends.

    Example:
        >>> class Counter(FitScope):
        ...     seen = until_next_fit.of(int)
        >>> counter = Counter()
        >>> counter.seen += 2
        >>> counter.end_fit()
        >>> counter.seen
        2
        >>> counter.begin_fit()
        >>> counter.seen
        0
    """

    lifetime = "until next"
    is_saved = False

    def saved(self) -> Self:
        """Save this attribute in checkpoints, under its name without a leading underscore, and return it.

        Its value must have types that a checkpoint may hold, or have ``state_dict`` and
        ``load_state_dict``.

        Example:
            >>> class Counter(FitScope):
            ...     _seen = until_next_fit.of(int).saved()
            >>> counter = Counter()
            >>> counter.load_saved({"seen": 2})
            >>> counter.saved_state()
            {'seen': 2}
        """
        self.is_saved = True
        return self


class FitScope:
    """Owner of attributes that live for one fit."""

    def begin_fit(self) -> None:
        """Drop the values of an earlier fit."""
        self.__dict__.pop(_VALUES, None)

    def end_fit(self) -> None:
        """Drop the values that live only during a fit."""
        _values(self, during_fit.lifetime).clear()

    def saved_state(self) -> dict[str, Any]:
        """Return the values of the saved attributes."""
        values = {key: getattr(self, name) for key, name in self._saved().items()}
        return {k: v.state_dict() if hasattr(v, "state_dict") else copy.copy(v) for k, v in values.items()}

    def load_saved(self, state: Mapping[str, Any]) -> None:
        """Continue with the values that :meth:`saved_state` returned."""
        for key, name in self._saved().items():
            value = getattr(self, name)
            if hasattr(value, "load_state_dict"):
                value.load_state_dict(state[key])
            else:
                setattr(self, name, copy.copy(state[key]))

    @classmethod
    def _saved(cls) -> dict[str, str]:
        """Return the names of the saved attributes, by their keys in a checkpoint."""
        members = [member for kind in reversed(cls.__mro__) for member in vars(kind).items()]
        return {n.removeprefix("_"): n for n, each in members if isinstance(each, until_next_fit) and each.is_saved}

    def __getstate__(self) -> dict[str, Any]:
        lasting = {until_next_fit.lifetime: dict(_values(self, until_next_fit.lifetime))}
        return {**self.__dict__, _VALUES: lasting}


def _values(instance: object, lifetime: str) -> dict[str, Any]:
    return instance.__dict__.setdefault(_VALUES, {}).setdefault(lifetime, {})  # type: ignore[no-any-return]
