"""The list of steps that undo a technique's changes to the module, the optimizers and the trainer."""

from collections.abc import Callable

from lightning.pytorch.utilities import rank_zero_warn


class UndoList:
    """Undo steps, run last in, first out.

    Running it is idempotent and never raises: an exception in ``on_exception`` would keep Lightning
    from calling the later callbacks, and one in ``teardown`` would hide the user's exception.

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
        """Add a step that undoes the last change."""
        self._steps.append(step)

    def run(self) -> None:
        """Run and remove all steps. If a step fails, warn and run the others."""
        failures = []
        while self._steps:
            step = self._steps.pop()
            try:
                step()
            except Exception as error:
                failures.append(f"{step!r} ({type(error).__name__}: {error})")
        if failures:
            rank_zero_warn(
                f"lightning-grad could not undo {'; '.join(failures)}. Build a new module and Trainer for another fit."
            )

    def __len__(self) -> int:
        return len(self._steps)
