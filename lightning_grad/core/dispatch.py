"""Wrapping a method of a foreign object, so that several techniques can, and nothing is left behind."""

import functools
from collections.abc import Callable
from enum import IntEnum
from typing import Any

Wrapper = Callable[..., Any]
_ABSENT = object()
_LIGHTNING = ("Callback", "LightningModule", "ModelHooks")


class WrapOrder(IntEnum):
    """Where a wrapper stands around a method, from the outermost to the innermost.

    =========== ================================================== =========================================================
    place       what stands there                                  why
    =========== ================================================== =========================================================
    ``LOOK``    quiet runs of the module, which mute its logs;     all other wrappers are inside, so what they do is muted
                a measurement of what all others have done         or measured as well
    ``INPUTS``  attacks, which change the batch                    an attack runs the step several times, each time through
                                                                   the weights that the real step trains
    ``WEIGHTS`` weights that a view shows for the time of a step;  the step and all that runs it again see the same weights
                the default, for all without a reason of their own
    ``REPEAT``  a second run of a validation step on other inputs  both runs see the same weights
    ``LOSSES``  reading and weighting losses                       only the operations of the real step are recorded, on the
                                                                   batch and the weights that the others have made
    ``METHOD``  another key for what the module logs               all others see the key that the module gave
    =========== ================================================== =========================================================

    Of two in one place the one that came last is outside.
    """

    METHOD = 1
    LOSSES = 2
    REPEAT = 3
    WEIGHTS = 4
    INPUTS = 5
    LOOK = 6


class MethodDispatcher:
    """Stands in for one method of one object and calls the wrappers around it, each at its place.

    It restores exactly what stood in the object's ``__dict__`` before, which need not be nothing: a compiled
    LightningModule keeps its own ``training_step`` there. A pickle or deep copy of the object gets its plain method.

    Args:
        owner: The object.
        name: Name of the method.
    """

    def __init__(self, owner: object, name: str) -> None:
        self._owner = owner
        self._name = name
        self._previous = owner.__dict__.get(name, _ABSENT)
        self._original: Callable[..., Any] = getattr(owner, name)
        self._wrappers: list[tuple[WrapOrder, Wrapper]] = []
        functools.update_wrapper(self, self._original)

    def add(self, wrapper: Wrapper, order: WrapOrder) -> tuple[WrapOrder, Wrapper]:
        """Put a wrapper ``wrapper(inner, *args, **kwargs)`` outside of all whose places are further inside."""
        entry = (order, wrapper)
        self._wrappers.append(entry)
        self._wrappers.sort(key=lambda entry: entry[0])
        return entry

    def remove(self, entry: tuple[WrapOrder, Wrapper]) -> None:
        """Take away what :meth:`add` returned; with the last one the object gets back what it had."""
        self._wrappers = [other for other in self._wrappers if other is not entry]
        if self._wrappers or self._owner.__dict__.get(self._name) is not self:
            return
        if self._previous is _ABSENT:
            del self._owner.__dict__[self._name]
        else:
            self._owner.__dict__[self._name] = self._previous

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self._original
        for _, wrapper in self._wrappers:
            call = functools.partial(wrapper, call)
        return call(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._owner, self._name)


def overrides(owner: object, name: str) -> bool:
    """Return whether a callback or module has a hook of its own, other than the empty one of Lightning.

    Lightning's classes are asked for by their names: each of its two namespaces has its own.

    Example:
        >>> from lightning.pytorch.callbacks import Timer
        >>> overrides(Timer(), "on_train_start"), overrides(Timer(), "on_before_optimizer_step")
        (True, False)
    """
    definer = next(cls for cls in type(owner).__mro__ if name in vars(cls))
    return definer.__name__ not in _LIGHTNING


def wrap_method(owner: object, name: str, wrapper: Wrapper, order: WrapOrder = WrapOrder.WEIGHTS) -> Callable[[], None]:
    """Wrap a method on the instance.

    Args:
        owner: The object whose method is wrapped.
        name: Name of the method.
        wrapper: Called as ``wrapper(inner, *args, **kwargs)``; calls ``inner`` to go on.
        order: Which wrappers are outside of this one and which inside, whatever the order of the calls.

    Returns:
        Callable: Takes this wrapper away again; may be called more than once, and in any order with others'.

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
