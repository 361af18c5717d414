"""Monitors that start over when the final pattern begins: what was best among dense weights says nothing about sparse ones.

Used by :class:`lightning_grad.callbacks.NMSparsity` alone. Callbacks are found by what they have, so those of both namespaces
of Lightning, and others that keep the same books, are met.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

_HELD = -2  # a wait count that one more check cannot bring to any patience


class MonitorRestart:
    """Restarts monitors once, and holds early stopping until then.

    In a run that validates this happens when the first validation of the final pattern begins, so that a value of dense
    weights, which a checkpoint saved between two validations would still go by, is not kept; else when the pattern begins.

    Args:
        is_wanted: Whether monitors are to restart, and the pattern changes in the run.
        is_done: Whether they did, before the run was resumed.
        at_validation: Whether the run validates.
    """

    def __init__(self, is_wanted: bool = False, is_done: bool = False, at_validation: bool = False) -> None:
        self.is_done = is_done
        self.at_validation = at_validation
        self.is_due = is_wanted and not is_done

    def announce(self, trainer: pl.Trainer, say: Callable[[str], None]) -> None:
        """Say what is held, if something is."""
        held = ", ".join(type(callback).__name__ for callback in _stoppers(trainer)) if self.is_due else ""
        if held:
            say(f"holds {held} until the final pattern has begun; with restart_monitors=False it may end the run first")

    def hold(self, trainer: pl.Trainer) -> None:
        """Keep callbacks that stop a run for want of improvement from doing so at their next check."""
        if self.is_due:
            for callback in _stoppers(trainer):
                callback.wait_count = _HELD

    def release(self, trainer: pl.Trainer) -> None:
        """Leave no wait count behind that only holding has made."""
        if self.is_due:
            for callback in _stoppers(trainer):
                callback.wait_count = max(callback.wait_count, 0)

    def restart(self, trainer: pl.Trainer, say: Callable[[str], None]) -> None:
        """Forget the best models and scores that callbacks have kept, and say so. Files stay on disk and are named."""
        self.is_due, self.is_done = False, True
        done = [_forget_best(callback) for callback in _checkpoints(trainer) if callback.best_k_models]
        done += [_start_waiting(callback) for callback in _stoppers(trainer)]
        if done:
            say(f"starts {' and '.join(done)} over, because the final pattern has begun")


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
