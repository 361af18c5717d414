"""Attributes that live for one fit: made when first read, dropped when the fit ends or the next begins.

A technique declares them in its class, so that nothing need be set to ``None`` and asserted not to be:

- :class:`during_fit` for what reaches into the run (the training set, hooks, tensors of a batch): dropped at the end of the
  fit, however it ends, and left out of pickles and copies;
- :class:`until_next_fit` for what is worth having afterwards (counts, a record, what a checkpoint needs): dropped when
  the next fit begins. With ``.saved()`` a checkpoint holds it, and a fit that resumes continues with it.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any, Generic, Self, TypeVar, overload

T = TypeVar("T")
_VALUES = "_fit_values"


class _Attribute(Generic[T]):
    """An attribute whose value stands in one dictionary of its owner, under the name of the lifetime and its own.

    Args:
        make: Makes the value from the owner when it is first read; without it the owner must set the value first.
    """

    lifetime: str

    def __init__(self, make: Callable[[Any], T] | None = None) -> None:
        self._make = make
        self.__doc__ = make.__doc__

    @classmethod
    def of(cls, make: Callable[[], T]) -> Self:
        """Return an attribute that begins as what ``make`` returns, a type for example: ``during_fit.of(list[int])``."""
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
                raise AttributeError(f"{owner.__name__}.{self._name} exists during a fit only, from where it is set.")
            values[self._name] = self._make(instance)
        return values[self._name]  # type: ignore[no-any-return]

    def __set__(self, instance: object, value: T) -> None:
        _values(instance, self.lifetime)[self._name] = value


class during_fit(_Attribute[T]):  # noqa: N801  (used like property)
    """An attribute that is dropped when the fit ends, however it ends, and never pickled or copied.

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
    """An attribute that is dropped when a fit begins, and stays after its end.

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
        """Return this attribute, to be held by the checkpoints of its owner under its name, without a leading underscore.

        Its value is what a checkpoint may hold, or has ``state_dict`` and ``load_state_dict``.

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
        """Drop what an earlier fit has left."""
        self.__dict__.pop(_VALUES, None)

    def end_fit(self) -> None:
        """Drop what lives during a fit only."""
        _values(self, during_fit.lifetime).clear()

    def saved_state(self) -> dict[str, Any]:
        """Return the values of the attributes that are saved."""
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
        """Return the names of the attributes that are saved, by the keys that they have in a checkpoint."""
        members = [member for kind in reversed(cls.__mro__) for member in vars(kind).items()]
        return {n.removeprefix("_"): n for n, each in members if isinstance(each, until_next_fit) and each.is_saved}

    def __getstate__(self) -> dict[str, Any]:
        lasting = {until_next_fit.lifetime: dict(_values(self, until_next_fit.lifetime))}
        return {**self.__dict__, _VALUES: lasting}


def _values(instance: object, lifetime: str) -> dict[str, Any]:
    return instance.__dict__.setdefault(_VALUES, {}).setdefault(lifetime, {})  # type: ignore[no-any-return]
