"""Wrap a method of an object: several techniques can wrap the same one, and each wrapper can be removed."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from enum import IntEnum
from types import MethodType
from typing import Any

Wrapper = Callable[..., Any]
_ABSENT = object()
_LIGHTNING = ("Callback", "LightningModule", "ModelHooks")
_ACTING: ContextVar[object] = ContextVar("acting", default=None)


class WrapOrder(IntEnum):
    """Position of a wrapper around a method, listed from the outermost to the innermost.

    =========== ================================================== ========================================================
    position    wrappers                                           reason
    =========== ================================================== ========================================================
    ``LOOK``    quiet runs of the module, which mute its logs;     all other wrappers are inside, so they are muted or
                measurements of what all other wrappers did        measured too
    ``INPUTS``  attacks, which change the batch                    an attack runs the step several times, always with the
                                                                   weights that the real step trains
    ``WEIGHTS`` weights that a view shows during a step;           the step and all repetitions of it see the same weights
                the default for all other wrappers
    ``REPEAT``  a second run of a validation step on other inputs  both runs see the same weights
    ``LOSSES``  capture and reweighting of losses                  only the operations of the real step are recorded, on the
                                                                   batch and the weights that the other wrappers made
    ``METHOD``  another key for what the module logs               all other wrappers see the module's own key
    =========== ================================================== ========================================================

    Of two wrappers in the same position, the later one is outside.
    """

    METHOD = 1
    LOSSES = 2
    REPEAT = 3
    WEIGHTS = 4
    INPUTS = 5
    LOOK = 6


@dataclass(frozen=True, eq=False)
class Entry:
    """A wrapper of a method.

    Args:
        order: Its position.
        wrapper: Called as ``wrapper(inner, *args, **kwargs)``.
        owner: Who added it, or ``None`` if this is not known.
    """

    order: WrapOrder
    wrapper: Wrapper
    owner: object = None


class MethodDispatcher:
    """Replaces one method of one object and calls the wrappers around it, each in its position.

    It restores exactly what the object's ``__dict__`` held before. That can be more than nothing: a
    compiled LightningModule keeps its own ``training_step`` there. A pickle or deep copy of the
    object gets the plain method.

    Args:
        owner: The object.
        name: Name of the method.
    """

    def __init__(self, owner: object, name: str) -> None:
        self._owner = owner
        self._name = name
        self._previous = owner.__dict__.get(name, _ABSENT)
        self._original: Callable[..., Any] = getattr(owner, name)
        self._wrappers: list[Entry] = []
        functools.update_wrapper(self, self._original)

    def add(self, wrapper: Wrapper, order: WrapOrder) -> Entry:
        """Add ``wrapper(inner, *args, **kwargs)`` around all wrappers whose position is further inside."""
        acting_now = _ACTING.get()
        entry = Entry(order, wrapper, _bound_to(wrapper) if acting_now is None else acting_now)
        self._wrappers.append(entry)
        self._wrappers.sort(key=lambda entry: entry.order)
        return entry

    def remove(self, entry: Entry) -> None:
        """Remove an entry that :meth:`add` returned; removing the last one restores the object."""
        self._wrappers = [other for other in self._wrappers if other is not entry]
        if self._wrappers or self._owner.__dict__.get(self._name) is not self:
            return
        if self._previous is _ABSENT:
            del self._owner.__dict__[self._name]
        else:
            self._owner.__dict__[self._name] = self._previous

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self._original
        for entry in self._wrappers:
            wrapper = entry.wrapper
            for meter in _METERS:
                wrapper = meter(entry.owner, wrapper)
            call = functools.partial(wrapper, call)
        return call(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._owner, self._name)


Meter = Callable[[object, Wrapper], Wrapper]
"""Called as ``meter(owner, wrapper)`` before each call of a wrapper; returns the wrapper to call instead."""

_METERS: list[Meter] = []


def overrides(owner: object, name: str) -> bool:
    """Return True if a callback or module overrides Lightning's empty hook.

    Lightning's classes are recognized by name, because each of its two namespaces defines its own.

    Example:
        >>> from lightning.pytorch.callbacks import Timer
        >>> overrides(Timer(), "on_train_start"), overrides(Timer(), "on_before_optimizer_step")
        (True, False)
    """
    definer = next(cls for cls in type(owner).__mro__ if name in vars(cls))
    return definer.__name__ not in _LIGHTNING


def is_empty_hook(method: Callable[..., Any]) -> bool:
    """Return True for one of Lightning's empty hooks; False for methods of other classes, functions and wrappers.

    A wrapper gets the method that it wraps, which may be a function on the instance. :func:`overrides` sees only classes.

    Example:
        >>> from lightning.pytorch.callbacks import Timer
        >>> timer = Timer()
        >>> is_empty_hook(timer.on_train_start), is_empty_hook(timer.on_before_optimizer_step), is_empty_hook(print)
        (False, True, False)
    """
    if not isinstance(method, MethodType):
        return False
    definers = [cls for cls in type(method.__self__).__mro__ if cls.__name__ in _LIGHTNING]
    # functools.wraps copies the name of a hook to its wrapper, so compare the functions.
    return any(vars(cls).get(method.__name__) is method.__func__ for cls in definers)


def wrap_method(owner: object, name: str, wrapper: Wrapper, order: WrapOrder = WrapOrder.WEIGHTS) -> Callable[[], None]:
    """Wrap a method on the instance.

    Args:
        owner: The object whose method is wrapped.
        name: Name of the method.
        wrapper: Called as ``wrapper(inner, *args, **kwargs)``; it calls ``inner`` to run the
            method.
        order: Position among other wrappers, independent of the order in which they are added.

    Returns:
        Callable: Removes this wrapper. It may be called more than once, in any order with other
            wrappers.

    Example:
        >>> class Greeter:
        ...     def greet(self):
        ...         return "hello"
        >>> greeter = Greeter()
        >>> undo = wrap_method(greeter, "greet", lambda inner: inner().upper())
        >>> greeter.greet()
        'HELLO'
        >>> undo()
        >>> greeter.greet(), greeter.__dict__
        ('hello', {})
    """
    dispatcher = owner.__dict__.get(name)
    if not isinstance(dispatcher, MethodDispatcher):
        dispatcher = MethodDispatcher(owner, name)
        owner.__dict__[name] = dispatcher
    return functools.partial(dispatcher.remove, dispatcher.add(wrapper, order))


@contextmanager
def acting(owner: object) -> Iterator[None]:
    """Name the owner of all wrappers that are added inside the block.

    Outside of such a block, the owner of a wrapper is the object whose method it is.
    """
    token = _ACTING.set(owner)
    try:
        yield
    finally:
        _ACTING.reset(token)


def meter_wrappers(meter: Meter) -> Callable[[], None]:
    """Pass every wrapper of every dispatcher through a function each time before it is called.

    Args:
        meter: Called as ``meter(owner, wrapper)``; returns the wrapper to call instead.

    Returns:
        Callable: Removes the meter.

    Example:
        >>> class Greeter:
        ...     def greet(self):
        ...         return "hello"
        >>> def tell(owner, wrapper):
        ...     print(f"a wrapper of {owner} runs")
        ...     return wrapper
        >>> greeter, stop = Greeter(), meter_wrappers(tell)
        >>> with acting("Shouting"):
        ...     undo = wrap_method(greeter, "greet", lambda inner: inner().upper())
        >>> greeter.greet()
        a wrapper of Shouting runs
        'HELLO'
        >>> undo(), stop()
        (None, None)
    """
    _METERS.append(meter)

    def remove() -> None:
        if meter in _METERS:
            _METERS.remove(meter)

    return remove


def _bound_to(wrapper: Wrapper) -> object:
    """Return the object whose method a wrapper is, or ``None`` if it is a function."""
    while isinstance(wrapper, functools.partial):
        wrapper = wrapper.func
    return getattr(wrapper, "__self__", None)
