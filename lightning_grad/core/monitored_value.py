"""Reading the metric that a callback monitors: only where it was logged again, and one value for all ranks."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_grad.core.dispatch import overrides
from lightning_grad.core.ranks import sum_over_ranks
from lightning_grad.functional.plain_tensors import on_plain_tensors, plain_tensor

_ROBUST = "adversarial"  # the namespace of what attacks inputs


class MonitoredValue:
    """One key of the trainer's callback metrics, over a stretch of the run.

    The trainer keeps old values. A value is new if another object stands under the key than when the stretch began.

    Args:
        key: Name of the metric.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self._before: Any = None

    def begin(self, trainer: pl.Trainer) -> None:
        """Begin a stretch."""
        self._before = trainer.callback_metrics.get(self.key)

    @on_plain_tensors
    def read(self, trainer: pl.Trainer) -> tuple[float | None, bool]:
        """Return the mean over ranks of the value that is new, ``None`` without one, and whether the key is known at all.

        To be called on every rank, also by one that has logged nothing: a rank without a new value does not count.
        """
        here: Any = trainer.callback_metrics.get(self.key)
        is_new = here is not None and here is not self._before
        # A callback may have put a plain number there.
        value = float(plain_tensor(here) if isinstance(here, Tensor) else here) if is_new else 0.0
        facts = torch.tensor([value, is_new, here is not None], dtype=torch.float64)
        total, count, known = sum_over_ranks(trainer, facts).tolist()
        return total / count if count > 0.0 else None, known > 0.0


def validated_keys(trainer: pl.Trainer) -> list[str]:
    """Return the names of all metrics that a validation has logged, in ``on_validation_end``, the sanity check's too.

    After a sanity check ``callback_metrics`` lacks those of several loaders.
    """
    keys = dict.fromkeys(trainer.callback_metrics)
    for metric in (trainer._results or {}).values():
        meta = metric.meta
        is_numbered = meta.add_dataloader_idx and meta.dataloader_idx is not None
        suffix = f"/dataloader_idx_{meta.dataloader_idx}" if is_numbered else ""
        if meta.on_epoch:
            keys |= dict.fromkeys((f"{meta.name}{suffix}", f"{meta.forked_name(on_step=False)}{suffix}"))
    return list(keys)


def describe_unknown(key: str, names: Iterable[str]) -> str:
    """Return that a metric is not logged, what is, and what may have been meant, in words."""
    known = sorted(names)
    similar = [*(name for name in known if key in name), *difflib.get_close_matches(key, known, n=3)]
    hint = f" Did you mean {' or '.join(map(repr, dict.fromkeys(similar)))}?" if similar else ""
    hint = hint or f" Log it by self.log({key!r}, ...), or set monitor to a metric that is logged."
    return f"monitor={key!r} is not logged. Logged are: {', '.join(known) or 'none'}.{hint}"


def refuse_unknown_monitor(
    trainer: pl.Trainer, key: str, seen: Sequence[str], in_validation: bool, needed_by: str
) -> None:
    """Raise before the first batch for a metric that is not logged, as far as the sanity check has shown it.

    To be called on every rank: a rank may log what another does not.

    Args:
        trainer: The trainer, when training starts.
        key: Name of the metric.
        seen: What the sanity check has logged; empty without one.
        in_validation: Whether the metric must be logged in validation.
        needed_by: Who asks, for the error.

    Raises:
        ValueError: If the sanity check logged other metrics only, or if AdversarialEvaluation would log the metric and is
            not there.
    """
    agree = trainer.strategy.reduce_boolean_decision
    is_known, was_checked = agree(key in seen, all=False), agree(bool(seen), all=False)
    if is_known:
        return
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    if key.startswith(f"{_ROBUST}/") and not any(_logs_robustness(callback, in_validation) for callback in callbacks):
        raise ValueError(
            f"{needed_by}: monitor={key!r} is logged by AdversarialEvaluation, which is not in the list of callbacks. Add "
            "AdversarialEvaluation() to it. If the module logs this key itself, set num_sanity_val_steps=2, so that it is "
            "seen before training."
        )
    if was_checked and in_validation:
        raise ValueError(
            f"{needed_by}: {describe_unknown(key, seen)} (This is what the sanity check logged.) If the module logs it in "
            "training, set interval='epoch'; if only in later validations, set num_sanity_val_steps=0."
        )


def _logs_robustness(callback: Any, in_validation: bool) -> bool:
    is_robust = getattr(callback, "namespace", None) == _ROBUST
    return is_robust and (not in_validation or overrides(callback, "on_validation_start"))
