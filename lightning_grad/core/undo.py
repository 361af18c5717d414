"""What a technique adds to other people's objects, it takes away through one list."""

from collections.abc import Callable

from lightning.pytorch.utilities import rank_zero_warn


class UndoList:
    """Steps back, run last in first out.

    Running it is idempotent and never raises: an exception inside ``on_exception`` would keep Lightning from calling
    every later callback, and inside ``teardown`` would hide the user's own.

    Example:
        >>> undo = UndoList()
        >>> undo.push(lambda: print("first in"))
        >>> undo.push(lambda: print("last in"))
        >>> undo.run()
        last in
        first in
        >>> undo.run()
    """

    def __init__(self) -> None:
        self._steps: list[Callable[[], object]] = []

    def push(self, step: Callable[[], object]) -> None:
        """Add the step that takes back what was just done."""
        self._steps.append(step)

    def run(self) -> None:
        """Take everything back. A step that fails is reported, and the others still run."""
        failures = []
        while self._steps:
            step = self._steps.pop()
            try:
                step()
            except Exception as error:
                failures.append(f"{step!r} ({type(error).__name__}: {error})")
        if failures:
            rank_zero_warn(
                f"lightning-grad could not undo {'; '.join(failures)}. Build the module and the Trainer anew for another fit."
            )

    def __len__(self) -> int:
        return len(self._steps)
