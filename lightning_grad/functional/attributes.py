"""The attributes of an object, wherever its classes keep them."""

import functools
from typing import Any


def attributes_of(value: Any) -> dict[str, Any]:
    """Return an object's attributes by name, also those in slots.

    Example:
        >>> class Point:
        ...     __slots__ = ("x", "__dict__")
        >>> point = Point()
        >>> point.x, point.name = 1, "origin"
        >>> attributes_of(point)
        {'x': 1, 'name': 'origin'}
    """
    kind: Any = type(value)
    slots = {name: getattr(value, name) for name in _slots_of(kind) if hasattr(value, name)}
    return {**slots, **getattr(value, "__dict__", {})}


@functools.cache
def _slots_of(kind: type) -> tuple[str, ...]:
    found: list[str] = []
    for cls in kind.__mro__:
        slots = vars(cls).get("__slots__", ())
        found += [slots] if isinstance(slots, str) else list(slots)
    return tuple(name for name in found if name not in ("__dict__", "__weakref__"))
