"""Resets monitors when the weights get their final form, because scores of dense weights are not comparable with later ones.

Callbacks are recognized by their attributes, which covers both namespaces of Lightning and third-party callbacks that use
the same names.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

_HELD = -2  # a wait count that stays below any patience after one more check


class MonitorRestart:
    """Resets monitors once, and keeps early stopping from ending the run until then.

    In a run that validates, the reset happens when the first validation of the final form begins: a checkpoint
    saved between two validations would otherwise still use a score of dense weights. In other runs it happens when
    the final form begins.

    Args:
        is_wanted: Whether to reset monitors, which makes sense if the form of the weights changes during the run.
        is_done: Whether the reset happened before the run was resumed.
        at_validation: Whether the run validates.
        event: What it waits for, as the end of a sentence that begins with because.
    """

    def __init__(
        self,
        is_wanted: bool = False,
        is_done: bool = False,
        at_validation: bool = False,
        event: str = "the final pattern has begun",
    ) -> None:
        self.is_done = is_done
        self.at_validation = at_validation
        self._event = event
        self.is_due = is_wanted and not is_done

    def announce(self, trainer: pl.Trainer, say: Callable[[str], None]) -> None:
        """Report which callbacks are held, if any."""
        held = ", ".join(type(callback).__name__ for callback in _stoppers(trainer)) if self.is_due else ""
        if held:
            say(f"holds {held} until {self._event}; with restart_monitors=False it may end the run first")

    def hold(self, trainer: pl.Trainer) -> None:
        """Keep early stopping from ending the run at its next check."""
        if self.is_due:
            for callback in _stoppers(trainer):
                callback.wait_count = _HELD

    def release(self, trainer: pl.Trainer) -> None:
        """Raise a wait count that :meth:`hold` made negative to zero."""
        if self.is_due:
            for callback in _stoppers(trainer):
                callback.wait_count = max(callback.wait_count, 0)

    def restart(self, trainer: pl.Trainer, say: Callable[[str], None]) -> None:
        """Reset the best models and scores of callbacks, and report it. Files stay on disk and are named."""
        self.is_due, self.is_done = False, True
        done = [_forget_best(callback) for callback in _checkpoints(trainer) if callback.best_k_models]
        done += [_start_waiting(callback) for callback in _stoppers(trainer)]
        if done:
            say(f"resets {' and '.join(done)}, because {self._event}")


def _checkpoints(trainer: pl.Trainer) -> list[Any]:
    callbacks: Sequence[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [c for c in callbacks if getattr(c, "monitor", None) and hasattr(c, "best_k_models")]


def _stoppers(trainer: pl.Trainer) -> list[Any]:
    callbacks: Sequence[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [c for c in callbacks if hasattr(c, "wait_count") and hasattr(c, "best_score") and hasattr(c, "patience")]


def _forget_best(callback: Any) -> str:
    kept = [os.path.basename(path) for path in callback.best_k_models]
    callback.best_k_models = {}
    callback.best_model_path = callback.kth_best_model_path = ""
    callback.best_model_score = callback.current_score = None
    callback.kth_value = _worst(getattr(callback, "mode", "min") == "min", callback.kth_value)
    stay = "stays" if len(kept) == 1 else "stay"
    return f"{type(callback).__name__} of {callback.monitor!r} ({', '.join(kept)} {stay} on disk)"


def _start_waiting(callback: Any) -> str:
    callback.best_score = _worst(getattr(callback, "mode", "min") == "min", callback.best_score)
    callback.wait_count = 0
    return f"{type(callback).__name__} of {getattr(callback, 'monitor', 'its metric')!r}"


def _worst(smaller_is_better: bool, like: Any) -> Tensor:
    worst = torch.tensor(torch.inf if smaller_is_better else -torch.inf)
    return worst.to(like.device) if isinstance(like, Tensor) else worst
