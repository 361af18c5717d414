"""What a trial measures while it trains: step times, passes between epochs, memory, and what the technique acts on."""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_grad.core import Chosen
from lightning_grad.core.dispatch import WrapOrder, wrap_method
from lightning_grad.utilities.reporting import is_log_step

Phase = Literal["validation", "elsewhere"]
PHASES: tuple[Phase, ...] = get_args(Phase)


class Watch:
    """Watches one fit. Its callbacks must be the first and the last of the Trainer.

    Args:
        technique: The technique whose choice is read; ``None`` for a fit without one.

    Attributes:
        seconds: Time of each optimizer step that counts: not the first one, not the last one of an epoch, and no log step.
        batches: Number of training batches.
        calls: Number of calls of the module's steps outside of training batches, in validations and elsewhere. A step
            that another step calls is not counted.
        chosen: What the technique acted on.
        device: Device of the module.
        peak: Peak memory of the device in bytes; ``None`` on the CPU.
    """

    def __init__(self, technique: Any = None) -> None:
        self.technique = technique
        self.seconds: list[float] = []
        self.calls: Counter[Phase] = Counter()
        self.chosen: Chosen | None = None
        self.device = ""
        self.peak: int | None = None
        self.batches = 0
        self.phase: Phase | None = "elsewhere"
        self.is_inside = False
        self.began = 0.0
        self._step = 0.0

    def around(self, callbacks: list[Callback]) -> list[Callback]:
        """Return the callbacks between the two of the watch."""
        return [_First(self), *callbacks, _Last(self)]

    def add_batch(self, trainer: pl.Trainer, seconds: float, batch_idx: int) -> None:
        """Add the time of a batch to that of its optimizer step, and keep the time of a whole step if it counts."""
        self._step += seconds
        accumulated: int = trainer.accumulate_grad_batches
        is_last = trainer.is_last_batch  # it may be smaller
        if (batch_idx + 1) % accumulated and not is_last:
            return
        if self.batches > accumulated and not is_last and not is_log_step(trainer):
            self.seconds.append(self._step)
        self._step = 0.0


class _First(Callback):
    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # The innermost wrapper, so it counts every call, no matter which technique makes it.
        for name in ("training_step", "validation_step"):
            wrap_method(pl_module, name, self._count, WrapOrder.METHOD)

    def _count(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        watch = self.watch
        if watch.is_inside:
            return inner(*args, **kwargs)
        if watch.batches and watch.phase is not None:  # a rehearsal before the first batch is no pass
            watch.calls[watch.phase] += 1
        watch.is_inside = True
        try:
            return inner(*args, **kwargs)
        finally:
            watch.is_inside = False

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.watch.phase = None
        self.watch.batches += 1
        self.watch.began = _now(pl_module)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.watch.phase = "validation"


class _Last(Callback):
    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.watch.add_batch(trainer, _now(pl_module) - self.watch.began, batch_idx)
        self.watch.phase = "elsewhere"

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.watch.phase = "elsewhere"

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.watch.device = str(pl_module.device)
        if pl_module.device.type == "cuda":
            self.watch.peak = torch.cuda.max_memory_allocated(pl_module.device)
        if self.watch.technique is not None:
            self.watch.chosen = self.watch.technique.chosen()


def _now(pl_module: pl.LightningModule) -> float:
    if pl_module.device.type != "cpu":
        torch.accelerator.synchronize(pl_module.device)
    return time.perf_counter()
