"""The base of callbacks that act on a metric: change the learning rate or the batch size, or stop the run."""

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, NoReturn

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_grad.core.callback import GradCallback
from lightning_grad.core.compatibility import AVERAGED, Compatibility, yes
from lightning_grad.core.dispatch import overrides, wrap_method
from lightning_grad.core.fit import during_fit, until_next_fit
from lightning_grad.core.missed_validation import is_validation_due, run_missed_validation
from lightning_grad.core.ranks import sum_over_ranks
from lightning_grad.functional.plain_tensors import on_plain_tensors, plain_tensor

Mode = Literal["max", "min"]
Interval = Literal["validation", "epoch"]
_ROBUST = "adversarial"  # the namespace of the techniques that attack inputs


class MonitoredValue:
    """One key of the trainer's callback metrics during an interval of the run.

    The trainer keeps old values. A value is new if the key holds a different object than at the
    start of the interval.

    Args:
        key: Name of the metric.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self._before: Any = None

    def begin(self, trainer: pl.Trainer) -> None:
        """Start an interval."""
        self._before = trainer.callback_metrics.get(self.key)

    @on_plain_tensors
    def read(self, trainer: pl.Trainer) -> tuple[float | None, bool]:
        """Return the mean of the new values over ranks (``None`` without one), and whether any rank knows the key.

        Call it on every rank. Ranks without a new value do not count.
        """
        here: Any = trainer.callback_metrics.get(self.key)
        is_new = here is not None and here is not self._before
        # A callback may have stored a plain number.
        value = float(plain_tensor(here) if isinstance(here, Tensor) else here) if is_new else 0.0
        facts = torch.tensor([value, is_new, here is not None], dtype=torch.float64)
        total, count, known = sum_over_ranks(trainer, facts).tolist()
        return total / count if count > 0.0 else None, known > 0.0


class MonitoredCallback(GradCallback):
    """Acts on each new value of a metric. A technique defines :meth:`observe`, and may define :meth:`restart`.

    - Stale and non-finite values are ignored.
    - All ranks get the same value, the mean over ranks, whether or not the module logs with
      ``sync_dist``.
    - A metric that is not logged raises an error: before the first batch if the sanity check shows
      it, otherwise when the first value is due. The error lists the metrics that are logged.
    - A validation that was due when a checkpoint was written runs before a resumed fit continues;
      Lightning would skip it.

    ``interval="validation"`` observes in ``on_validation_end``, so checkpoints of that validation
    include the action. ``interval="epoch"`` wraps the module's ``on_train_epoch_end``: it sees what
    that hook logs, and runs before callbacks that monitor metrics at the end of the epoch.

    Class attributes:

    - ``nothing_done``: ends the warning "... never received a finite value of 'val_acc', so ...".

    Args:
        monitor: Metric to observe, under the name that the module logs.
        mode: max if larger is better, min if smaller is.
        interval: Observe at each validation, or once at the end of each training epoch.
        name: Name of this instance, needed if two of a class are used; part of state and log keys.
    """

    compatibility: ClassVar[Compatibility] = GradCallback.compatibility.but(
        ddp=yes("All ranks act together, on the mean of their values."), weight_averaging=yes(AVERAGED)
    )
    nothing_done: ClassVar[str] = "it did nothing"

    observed = until_next_fit.of(int).saved()
    """Number of values since the last :meth:`restart`."""
    _in_validation = during_fit[MonitoredValue](lambda self: MonitoredValue(self.monitor))
    _in_epoch = during_fit[MonitoredValue](lambda self: MonitoredValue(self.monitor))
    _validated = until_next_fit[float | None](lambda _: None).saved()  # value that waits for the end of the epoch
    _due = until_next_fit[float | None](lambda _: None).saved()  # epochs done, if a validation is due now
    _changed = during_fit.of(list[str])
    _has_validated = during_fit.of(bool)  # in the current epoch
    _has_whole_epoch = during_fit.of(bool)
    _was_validated = during_fit.of(bool)  # in this fit
    _sanity_keys = during_fit.of(list[str])  # keys that the sanity check logged

    def __init__(
        self, monitor: str, mode: Mode = "max", interval: Interval = "validation", name: str | None = None
    ) -> None:
        super().__init__(name)
        self.monitor = monitor
        self.mode = mode
        self.interval = interval

    def observe(self, trainer: pl.Trainer, value: float) -> None:
        """Act on a new value. Called on every rank with the same value."""
        raise NotImplementedError(f"{type(self).__name__} must define observe(trainer, value).")

    def restart(self) -> str:
        """Forget earlier values, because a resumed fit has another metric or interval.

        Returns:
            str: What is kept nevertheless, for the printed line.
        """
        return ""

    def is_reached(self, value: float, bound: float) -> bool:
        """Return True if a value is at least as good as a bound."""
        return value >= bound if self.mode == "max" else value <= bound

    def epochs_done(self, trainer: pl.Trainer) -> float:
        """Return how many epochs were done when the current value was measured, as a fraction within an epoch."""
        return _epochs_done(trainer) if self._due is None else self._due

    # The fit begins.

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if not self.fitting:
            return
        if trainer.barebones:
            raise ValueError(
                f"{self.display_name} observes {self.monitor!r}, but Trainer(barebones=True) turns logging off. Set "
                "barebones=False."
            )
        if self.interval == "validation" and not trainer.enable_validation:
            self._refuse_without_validation()

    def _refuse_without_validation(self) -> NoReturn:
        raise ValueError(
            f"{self.display_name} observes {self.monitor!r} at validations, and this fit has none. Define "
            "validation_step, pass a validation loader to fit() and set limit_val_batches above 0; or observe a "
            "training metric with interval='epoch'."
        )

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self._changed = self.changed_settings(state, "monitor", "interval")

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._changed:
            self.observed, self._validated = 0, None
            stays = self.restart()
            why = f"restarts its observations, because {' and '.join(self._changed)} changed"
            self.say("; ".join(filter(None, (why, stays))))
        if self.interval == "epoch":

            def end_epoch(inner: Callable[..., Any], *args: Any) -> None:
                inner(*args)
                self._end_epoch(trainer)

            self.undo.push(wrap_method(pl_module, "on_train_epoch_end", end_epoch))

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # If the first epoch has a validation, the sanity check or Lightning has loaded the loaders
        # by now.
        if self.interval == "validation" and trainer.val_dataloaders is not None and not sum(trainer.num_val_batches):
            self._refuse_without_validation()
        if not self.observed:
            refuse_unknown_monitor(
                trainer, self.monitor, self._sanity_keys, self.interval == "validation", self.display_name
            )
        if self._due is not None:
            end = partial(self._end_missed_epoch, trainer, self._due)
            self.undo.push(run_missed_validation(trainer, end))

    def _end_missed_epoch(self, trainer: pl.Trainer, epochs: float) -> None:
        # Lightning continues with the next epoch and calls no hook for the end of this one.
        if self.interval == "epoch" and self._validated is not None and epochs.is_integer():
            self._due = epochs
            self._take(trainer, self._validated)
            self._validated = self._due = None

    # One observation.

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not at the end of the previous epoch: its metrics get new tensors until its very end.
        self._in_epoch.begin(trainer)
        self._has_validated, self._has_whole_epoch = False, True

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self._due = _epochs_done(trainer) if is_validation_due(trainer) else None

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._in_validation.begin(trainer)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.fitting:
            return
        if trainer.sanity_checking:
            self._sanity_keys = validated_keys(trainer)
            return
        self._was_validated = True
        value, is_known = self._in_validation.read(trainer)
        if self.interval == "epoch":
            # A run that resumes from a checkpoint of this validation finds the value only here.
            self._validated = self._validated if value is None else value
            self._has_validated = True
        elif value is not None:
            self._take(trainer, value)
        elif not self.observed and "nonfinite" not in self._said:
            self._refuse_unlogged(trainer, is_known)
        self._due = None

    def _end_epoch(self, trainer: pl.Trainer) -> None:
        value, is_known = self._in_epoch.read(trainer)
        value = self._validated if value is None else value
        self._validated = None
        may_be_late = trainer.enable_validation and not self._has_validated
        if value is not None:
            self._take(trainer, value)
        elif not is_known and not self.observed and self._has_whole_epoch and not may_be_late:
            self._refuse_unlogged(trainer, is_known)

    def _take(self, trainer: pl.Trainer, value: float) -> None:
        if math.isfinite(value):
            self.observed += 1
            self.observe(trainer, value)
        else:
            self.tell_once("nonfinite", rank_zero_warn, f"{self.monitor} is {value}; non-finite values are ignored.")

    def _refuse_unlogged(self, trainer: pl.Trainer, is_known: bool) -> NoReturn:
        if is_known:
            raise RuntimeError(
                f"{self.display_name}: monitor={self.monitor!r} is logged in training, not in validation. Set "
                "interval='epoch'."
            )
        raise RuntimeError(f"{self.display_name}: {describe_unknown(self.monitor, trainer.callback_metrics)}")

    # The end.

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.observed:
            return
        if "nonfinite" in self._said:
            why = "All values were non-finite. Check how they are computed"
        elif self.interval == "validation" and not self._was_validated:
            why = "No validation ran. Check check_val_every_n_epoch and val_check_interval of the Trainer"
        else:
            why = "It was never logged. Log it, or set monitor to a metric that is logged"
        rank_zero_warn(
            f"{self.display_name} never received a finite value of {self.monitor!r}, so {self.nothing_done}. {why}."
        )


def _epochs_done(trainer: pl.Trainer) -> float:
    batches = trainer.num_training_batches
    part = (trainer.fit_loop.batch_idx + 1) / batches if math.isfinite(batches) and batches > 0 else 1.0
    return float(trainer.current_epoch + part)


def validated_keys(trainer: pl.Trainer) -> list[str]:
    """Return the names of all metrics that a validation or sanity check logged. Call it in ``on_validation_end``.

    After a sanity check with several loaders, ``callback_metrics`` alone would not be complete.
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
    """Return the text of an error for a metric that is not logged, with the logged names and similar ones."""
    known = sorted(names)
    similar = [*(name for name in known if key in name), *difflib.get_close_matches(key, known, n=3)]
    hint = f" Did you mean {' or '.join(map(repr, dict.fromkeys(similar)))}?" if similar else ""
    hint = hint or f" Log it with self.log({key!r}, ...), or set monitor to a metric that is logged."
    return f"monitor={key!r} is not logged. Logged metrics: {', '.join(known) or 'none'}.{hint}"


def refuse_unknown_monitor(
    trainer: pl.Trainer, key: str, seen: Sequence[str], in_validation: bool, needed_by: str
) -> None:
    """Raise before the first batch if the sanity check shows that a metric is not logged.

    Call it on every rank: one rank may log a metric that another does not.

    Args:
        trainer: The trainer, when training starts.
        key: Name of the metric.
        seen: Names that the sanity check logged; empty without a sanity check.
        in_validation: Whether the metric must be logged in validation.
        needed_by: Name of the technique, for the error.

    Raises:
        ValueError: If the sanity check logged only other metrics, or if the metric belongs to
            AdversarialEvaluation, which is not in the list of callbacks.
    """
    agree = trainer.strategy.reduce_boolean_decision
    is_known, was_checked = agree(key in seen, all=False), agree(bool(seen), all=False)
    if is_known:
        return
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    if key.startswith(f"{_ROBUST}/") and not any(_logs_robustness(callback, in_validation) for callback in callbacks):
        raise ValueError(
            f"{needed_by}: monitor={key!r} is logged by AdversarialEvaluation, which is not in the list of callbacks. "
            "Add AdversarialEvaluation() to it. If the module logs this key itself, set num_sanity_val_steps=2, so "
            "that the key is found before training."
        )
    if was_checked and in_validation:
        raise ValueError(
            f"{needed_by}: {describe_unknown(key, seen)} (The sanity check logged these.) If the module logs it in "
            "training, set interval='epoch'; if only in later validations, set num_sanity_val_steps=0."
        )


def _logs_robustness(callback: Any, in_validation: bool) -> bool:
    is_robust = getattr(callback, "namespace", None) == _ROBUST
    return is_robust and (not in_validation or overrides(callback, "on_validation_start"))
