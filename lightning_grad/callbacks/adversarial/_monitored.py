"""Reading the metric that a callback monitors: only where it was logged anew, and one value for all ranks."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import torch


class MonitoredValue:
    """One key of the trainer's callback metrics, over a stretch of the run.

    The trainer keeps old values. A value is new if another object stands under the key than when the stretch began.

    Args:
        key: Name of the metric.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self._before: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_before": None}

    def begin(self, trainer: pl.Trainer) -> None:
        """Begin a stretch."""
        self._before = trainer.callback_metrics.get(self.key)

    def read(self, trainer: pl.Trainer) -> tuple[float | None, bool]:
        """Return the mean over ranks of the value that is new, ``None`` without one, and whether the key is known at all.

        To be called on every rank, also by one that has logged nothing: a rank without a new value does not count.
        """
        here = trainer.callback_metrics.get(self.key)
        is_new = here is not None and here is not self._before
        value = float(here) if is_new and here is not None else 0.0
        if trainer.world_size == 1:
            return value if is_new else None, here is not None
        facts = torch.tensor(
            [value, float(is_new), float(here is not None)], dtype=torch.float64, device=trainer.strategy.root_device
        )
        total, share, known = trainer.strategy.reduce(facts, reduce_op="mean").tolist()
        return total / share if share > 0.0 else None, known > 0.0


def describe_unknown(key: str, names: Iterable[str]) -> str:
    """Say that a metric is not logged, what is, and what may have been meant."""
    known = sorted(names)
    similar = [*(name for name in known if key in name), *difflib.get_close_matches(key, known, n=3)]
    hint = f" Did you mean {' or '.join(map(repr, dict.fromkeys(similar)))}?" if similar else ""
    return f"monitor={key!r} is not logged. Logged are: {', '.join(known) or 'none'}.{hint}"
