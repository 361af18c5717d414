"""Batch sizes that grow with the noise of the gradient. The rule is in ``functional/batch_size``."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_grad.core import (
    GradCallback,
    check_count,
    during_fit,
    is_log_step,
    is_repeated,
    until_next_fit,
)
from lightning_grad.core.compatibility import SCALED, Compatibility, manual, no, yes
from lightning_grad.core.ranks import averaging_ranks
from lightning_grad.core.roles import conditioners
from lightning_grad.core.steps.noise_scale import NoiseScale, NoiseScaleMeter
from lightning_grad.functional import next_accumulation, norm_test_batch_size, total_norm
from lightning_grad.functional.choices import check_choice
from lightning_grad.functional.plain_tensors import on_plain_tensors
from lightning_grad.utilities.checks import check_finite_above

_LEAST = 5  # measurements before the first decision by averages
_MOST_GROWTH = 2  # of a decision by averages, whose signal may be close to zero at first
_WHOLE = no("compares gradients of parts of a batch, and {} shards them", "Train with strategy='ddp' or on one device")


class AdaptiveBatchSize(GradCallback):
    r"""Grow the batch when the noise of the gradient is large against the gradient, by accumulation (AdAdaGrad).

    .. math::
        B \leftarrow \max\Bigl(B, \frac{\operatorname{Var}_i}{\eta^2 \lVert g \rVert^2}\Bigr)

    :math:`\operatorname{Var}_i` is the variance of the gradient of one sample, summed over its entries. It is measured
    by comparing the accumulated batches of a step, and those of all ranks. The batch size B grows by more accumulated
    batches, and never shrinks. The loader and its batches stay as they are.

    A new number of accumulated batches starts only where the old and the new one end a step together, or with an
    epoch, because a step would otherwise include gradients of the step before. Until then, the largest number that
    may start earlier is used.

    The learning rate stays; :class:`BatchSizeLRScaling` makes it follow. Schedules that count steps were made for the
    steps of the batch size at the start: with larger batches they do not reach their end. Use schedules by epoch.

    Args:
        eta: Largest ratio of the noise of the gradient to its norm, above 0. Smaller: larger batches.
            The paper uses values from 0.1 to 0.5.
        max_accumulation: Largest number of accumulated batches; 1 turns the callback off.
        start: Accumulated batches at the start. Default: those of the Trainer.
        estimator: "unbiased" averages over measurements and corrects the norm; "paper" uses one step as it is.
            The paper's norm includes noise, so "paper" asks for fewer samples.
        every_n_steps: Measure and decide in every this many optimizer steps (the paper: 1).
        name: Name of this instance, part of its log keys and its state.

    Raises:
        ValueError: In the constructor for numbers out of range. Before the first batch for one accumulated batch on
            one rank, which has no variance; with more accumulated batches than ``max_accumulation``; next to
            ``GradientAccumulationScheduler``, a second instance, or a technique before it in the list that changes
            gradients; under manual optimization, FSDP, DeepSpeed and strategies that do not average gradients.

    **Hooks.** Hooks of the parameters in measured steps. ``on_before_optimizer_step`` decides, and
    ``on_train_batch_start`` changes ``trainer.accumulate_grad_batches``. After the fit it is what it was.

    **Logs** under ``batch_size/``, at log steps: ``samples`` (of a step), ``wanted`` (by the norm test), ``variance``
    (of one sample) and ``norm`` (of the gradient), both of the last measured step.

    **State.** The accumulated batches, those to reach, the number of steps, and the averages.

    **Cost.** In measured steps, one norm for each parameter and accumulated batch, and one wait for the device.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.AdaptiveBatchSize
                  init_args:
                    eta: 0.5
                    start: 2
                    max_accumulation: 32

    References:
        Lau, Liu and Kolar, "AdAdaGrad: Adaptive Batch Size Schemes for Adaptive Gradient Methods", 2024, arXiv
        2402.11215. Its coordinate-wise test is not included. The estimate without bias is from McCandlish et al.,
        2018, arXiv 1812.06162, appendix A.1; averages over steps, growth to at most twice the size at a time, and
        every_n_steps are choices of this library.
    """

    namespace: ClassVar[str] = "batch_size"
    syncs_per_step: ClassVar[str] = (
        "the host must know the next batch size: one wait every every_n_steps optimizer steps"
    )
    compatibility: ClassVar[Compatibility] = GradCallback.compatibility.but(
        accumulation=yes("It changes the number of accumulated batches."),
        fp16=yes("It measures unscaled gradients, and ignores steps that overflow."),
        fused_fp16=SCALED,
        ddp=yes("The variance is measured over ranks too, and all ranks change together."),
        fsdp2=_WHOLE,
        fsdp1=_WHOLE,
        deepspeed=_WHOLE,
        late_gradients=no(
            "compares gradients of parts of a batch with their mean, and {} exchanges something else",
            "Use strategy='ddp'",
        ),
        local_steps=no("needs the same number of batches on all ranks, and {} lets them differ", "Use strategy='ddp'"),
        sparse_gradients=no(
            "needs dense gradients, and {} creates sparse ones", "Build it with sparse=False, or drop the callback"
        ),
        **manual(no("accumulates batches through the Trainer, and {} does not", "Use automatic optimization")),
    )
    trial: ClassVar[Mapping[str, Any]] = {
        "eta": 0.05,
        "start": 2,
        "max_accumulation": 3,
        "estimator": "paper",
        "every_n_steps": 1,
    }
    neutral: ClassVar[Mapping[str, Any] | str] = {"start": None, "max_accumulation": 1}

    _accumulation = until_next_fit.of(int).saved()  # 0 before the training starts
    _target = until_next_fit.of(int).saved()
    _steps = until_next_fit.of(int).saved()  # optimizer steps so far
    _noise = until_next_fit[NoiseScale](lambda _: NoiseScale(warms_up=True)).saved()
    _given = during_fit.of(int)  # what the Trainer or start says
    _meter = during_fit[NoiseScaleMeter](lambda self: NoiseScaleMeter(self._noise))
    _batch_size = during_fit.of(int)
    _seen = during_fit.of(dict[str, Tensor])

    def __init__(
        self,
        eta: float = 0.5,
        max_accumulation: int = 32,
        start: int | None = None,
        estimator: Literal["unbiased", "paper"] = "unbiased",
        every_n_steps: int = 10,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        check_choice(estimator, ["unbiased", "paper"], "estimator")
        self.eta = check_finite_above(eta, 0.0, "eta")
        self.max_accumulation = check_count(max_accumulation, 1, "max_accumulation")
        self.start = check_count(start, 1, "start")
        self.estimator = estimator
        self.every_n_steps = check_count(every_n_steps, 1, "every_n_steps")
        if start is not None and start > max_accumulation:
            raise ValueError(f"start must be at most max_accumulation={max_accumulation}; got {start}.")

    @property
    def is_neutral(self) -> bool:
        """Whether it never changes anything."""
        return self.max_accumulation == 1

    # The fit begins.

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if not self.fitting or self.is_neutral:
            return
        self._refuse_others(trainer)
        before = trainer.accumulate_grad_batches
        self.undo.push(lambda: setattr(trainer, "accumulate_grad_batches", before))
        # Here, so a schedule that asks for the number of steps gets that of the start.
        self._given = trainer.accumulate_grad_batches = self.start or before
        if self._given > self.max_accumulation:
            raise ValueError(
                f"{self.display_name}(max_accumulation={self.max_accumulation}) must be at least "
                f"Trainer(accumulate_grad_batches={self._given})."
            )
        why_not = NoiseScaleMeter.why_not(trainer, pl_module)
        if why_not is not None:
            raise ValueError(
                f"{self.display_name} cannot measure the noise of the gradient: {why_not}. Set start=2 or more."
            )

    def _refuse_others(self, trainer: pl.Trainer) -> None:
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            kind = type(other).__name__
            is_second = isinstance(other, AdaptiveBatchSize) and other is not self and not other.is_neutral
            if is_second or kind == "GradientAccumulationScheduler":
                raise ValueError(
                    f"{self.display_name} and {getattr(other, 'display_name', kind)} would both set the number of "
                    "accumulated batches. Keep one."
                )
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        for other in conditioners(trainer):
            if other.role in ("center", "clip", "noise") and callbacks.index(other) < callbacks.index(self):
                raise ValueError(
                    f"{self.display_name} measures gradients, and {other.display_name} changes them before. Put "
                    f"{self.display_name} in front of it in the list of callbacks."
                )

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        names = [f"optimizers[{index}]" for index in range(len(trainer.optimizers))]
        if self.is_neutral:
            self.announce("changes nothing, because max_accumulation is 1", "optimizers", names)
            return
        for optimizer in trainer.optimizers:
            self.works_with().refuse_optimizer(self.display_name, trainer, optimizer)
        self.works_with().refuse_parameters(self.display_name, pl_module)
        self.undo.push(lambda: self._meter.stop())
        self._begin(trainer)
        words = f"accumulates from {self._accumulation} up to {self.max_accumulation} batches for each step"
        self.announce(words, "optimizers", names)

    def _begin(self, trainer: pl.Trainer) -> None:
        """Continue with the accumulated batches of a checkpoint, or begin with those that are given."""
        # A checkpoint may be of a run with a larger max_accumulation.
        self._accumulation = min(self._accumulation or self._given, self.max_accumulation)
        self._target = min(max(self._target, self._accumulation), self.max_accumulation)
        trainer.accumulate_grad_batches = self._accumulation

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.is_neutral:
            return
        self._begin(trainer)  # some strategies restore after on_fit_start, and so does a search for a learning rate
        if any(config.interval == "step" and not config.reduce_on_plateau for config in trainer.lr_scheduler_configs):
            self.tell_once(
                "schedule",
                rank_zero_info,
                "a schedule counts optimizer steps, and larger batches take fewer of them, so it ends later. Use a "
                "schedule with interval='epoch', or one that does not depend on the number of steps.",
            )

    # One optimizer step.

    @property
    def _measures(self) -> bool:
        return not self.is_neutral and self._steps % self.every_n_steps == 0

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:
            self._change(trainer, self._target)
        elif self._target > self._accumulation and batch_idx % self._accumulation == 0:
            # Not at the end of the batch before, where others still need the number of its step.
            self._change(trainer, next_accumulation(batch_idx, self._accumulation, self._target))
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._meter.stop()  # a batch that was None, or ended its epoch, left a step unfinished
        if self._measures:
            self._meter.begin_batch([p for o in trainer.optimizers for g in o.param_groups for p in g["params"]], batch)
            self._batch_size = max(self._batch_size, self._meter.batch_size)

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if is_repeated(pl_module):
            self._meter.begin_again()

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._meter.end_part()

    @override
    @torch.no_grad()
    @on_plain_tensors
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self._measures:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            if gradients:
                self._measure(trainer, total_norm(gradients, accurate=True))
            self._meter.stop()
        self._steps += not self.is_neutral

    def _measure(self, trainer: pl.Trainer, norm: Tensor) -> None:
        found = self._meter.measure(trainer, norm)
        wanted = None
        if found is not None:
            (noise, signal), samples = found
            if self.estimator == "paper":
                wanted = norm_test_batch_size(noise, signal, self.eta, samples)
            else:
                averages = self._noise.read()
                wanted = norm_test_batch_size(averages["noise_trace"], averages["signal_squared"], self.eta)
            self._seen = {"wanted": wanted, "variance": noise, "norm": (signal + noise / samples).clamp(min=0.0).sqrt()}
        if self._target < self.max_accumulation:
            target = self._target
            if wanted is not None:
                size, variance = torch.stack([wanted, noise]).tolist()
                self._noise.count -= not math.isfinite(variance)  # an overflow is no measurement
                target = self._decide(trainer, size)
            # A rank may have measured other batch sizes.
            self._target = int(trainer.strategy.broadcast(target)) if trainer.world_size > 1 else target

    def _decide(self, trainer: pl.Trainer, wanted: float) -> int:
        """Return the number of accumulated batches to reach."""
        if math.isnan(wanted) or self._meter.batch_size < self._batch_size:
            return self._target  # a smaller batch at the end of an epoch
        most = self.max_accumulation
        if self.estimator == "unbiased":
            if self._noise.count < _LEAST:
                return self._target
            most = min(most, _MOST_GROWTH * self._accumulation)
        batches = wanted / (self._batch_size * averaging_ranks(trainer))
        return max(self._target, min(most, math.ceil(min(batches, most))))

    def _change(self, trainer: pl.Trainer, accumulation: int) -> None:
        if self.is_neutral or accumulation == self._accumulation:
            return
        self._accumulation = trainer.accumulate_grad_batches = accumulation
        samples = accumulation * self._batch_size * averaging_ranks(trainer)
        size = f" ({samples} samples)" if samples else ""  # unknown in the first batch of a run that resumes
        self.say(f"accumulates {accumulation} batches{size} from step {trainer.global_step} on")

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._seen and is_log_step(trainer):
            samples = self._accumulation * self._batch_size * averaging_ranks(trainer)
            self.log_scalars(pl_module, {"samples": float(samples), **self._seen})
