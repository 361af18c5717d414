"""The time of a run by the callback, or the part of the step, whose code runs."""

from collections import Counter
from collections.abc import Callable, Collection
from threading import get_ident
from time import perf_counter_ns
from typing import Any

REST = "Lightning and everything else"


class OwnerStack:
    """Knows whose code runs: a callback's, a part of the step's, or everything else.

    Calls from other threads are not counted: backward runs in threads of its own on a GPU.

    Args:
        callbacks: Labels of the callbacks.
    """

    def __init__(self, callbacks: Collection[str]) -> None:
        self._callbacks = frozenset(callbacks)
        self._stack: list[str] = []
        self._thread = get_ident()

    def begin(self) -> None:
        """Begin to count."""
        self._stack = [REST]

    def end(self) -> None:
        """Count no more, even if calls are still running."""
        self._stack = []

    @property
    def counts(self) -> bool:
        """Whether calls are counted now, in this thread."""
        return bool(self._stack) and get_ident() == self._thread

    def enter(self, owner: str) -> None:
        """Count what follows for an owner."""
        self._stack.append(owner)

    def leave(self) -> None:
        """Count what follows for the previous owner."""
        if self._stack:
            self._stack.pop()

    def enter_part(self, part: str) -> None:
        """Count what follows for a part of the step, or still for the callback that runs this part itself."""
        self.enter(self._stack[-1] if self._stack[-1] in self._callbacks else part)

    def call(self, owner: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function for an owner."""
        self.enter(owner)
        try:
            return function(*args, **kwargs)
        finally:
            self.leave()

    def call_part(self, part: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function for a part of the step; see :meth:`enter_part`."""
        self.enter_part(part)
        try:
            return function(*args, **kwargs)
        finally:
            self.leave()

    def call_wrapper(
        self, owner: str, wrapper: Callable[..., Any], inner: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Call a wrapper for its owner, and what it wraps for the caller.

        A wrapper may run what it wraps several times, as an attack does. Only the last run is the
        step of the training; the others are work of the wrapper.
        """
        caller = self._stack[-1]
        last: Counter[str] | None = None

        def run(*own: Any, **named: Any) -> Any:
            nonlocal last
            if last is not None:
                self._take_over(owner, last)
            before = self._spent()
            try:
                return self.call(caller, inner, *own, **named)
            finally:
                last = self._spent() - before

        return self.call(owner, wrapper, run, *args, **kwargs)

    def _spent(self) -> Counter[str]:
        return Counter()

    def _take_over(self, owner: str, spent: Counter[str]) -> None:
        """Count for an owner what was counted for others."""


class StepClock(OwnerStack):
    """Measures the time between calls of this class with the host's clock, and adds it up by owner.

    Args:
        callbacks: Labels of the callbacks.

    Attributes:
        in_batches: Nanoseconds in batches, by owner.
        between: Nanoseconds between batches: validation, and the hooks of epochs.
    """

    def __init__(self, callbacks: Collection[str]) -> None:
        super().__init__(callbacks)
        self.in_batches: Counter[str] = Counter()
        self.between: Counter[str] = Counter()
        self._current = self.between
        self._since = 0

    def begin(self) -> None:
        super().begin()
        self._since = perf_counter_ns()

    def end(self) -> None:
        self._settle()
        super().end()

    def begin_batch(self) -> None:
        """Add what follows to the batches."""
        self._settle()
        self._current = self.in_batches

    def end_batch(self) -> None:
        """Add what follows to the time between batches."""
        self._settle()
        self._current = self.between

    def enter(self, owner: str) -> None:
        self._settle()
        super().enter(owner)

    def leave(self) -> None:
        self._settle()
        super().leave()

    def _settle(self) -> None:
        now = perf_counter_ns()
        if self._stack:
            self._current[self._stack[-1]] += now - self._since
        self._since = now

    def _spent(self) -> Counter[str]:
        return self._current.copy()

    def _take_over(self, owner: str, spent: Counter[str]) -> None:
        self._current.subtract(spent)
        self._current[owner] += spent.total()
