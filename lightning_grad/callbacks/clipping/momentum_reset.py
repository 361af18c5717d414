"""Momentum reset (SPAM): the callback.

The rules are :func:`lightning_grad.functional.reset_moments_` and
:func:`lightning_grad.functional.reset_warmup`.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import lightning.pytorch as pl
from torch.optim import Optimizer
from typing_extensions import override

from lightning_grad.core import OptimizerCallback, check_count, during_fit, is_log_step, until_next_fit
from lightning_grad.core.compatibility import Compatibility, no, yes
from lightning_grad.functional import reset_warmup
from lightning_grad.utilities.checks import lacking
from lightning_grad.utilities.optimizers import OptimizerCounts

_LONGEST_DEFAULT = 150  # steps of warm-up in the released code


class MomentumReset(OptimizerCallback):
    r"""Reset the moments of an Adam-like optimizer at intervals, then warm up the learning rate again (SPAM).

    .. math::
        m = v = 0 \text{ every } \Delta T \text{ steps, then} \quad
        \mathrm{lr}_k = \mathrm{lr} \cdot \Bigl(1 - 0.99 \cdot \frac{1 + \cos(\pi k / (T + 1))}{2}\Bigr), \quad k < T

    Without resets, a spike that entered the moments affects hundreds of steps. Use it with
    :class:`SpikeClipping`, which pauses after each reset.

    Args:
        every_n_steps: Optimizer steps from one reset to the next (500 in the paper).
        warmup_steps: Steps after a reset with a reduced learning rate; 0 disables the warm-up.
            Default: 150, as in the released code, or half of every_n_steps if that is less.
        name: Name of this instance, part of its log keys and its state.

    Raises:
        ValueError: In the constructor if every_n_steps is below 1 or warmup_steps is not from 0 to
            every_n_steps - 1. Before the first batch with a fused optimizer in fp16, under
            DeepSpeed, if no optimizer keeps ``exp_avg_sq``, or for a second instance.

    **Hooks.** The hooks of :class:`~lightning_grad.core.OptimizerCallback` before and after a step,
    called only for steps that are actually taken. A step that the GradScaler skips is not counted,
    resets nothing and does not change the learning rate. A step without gradients (skipped by
    ``SkipNonFinite``) is not counted. The learning rate is restored after the step, before a
    scheduler reads it. If the training step sets a learning rate, that rate is reduced too, and kept
    afterwards.

    **Logs** under ``grad/momentum_reset/``, at log steps: ``lr_factor`` and ``resets``.

    **State.** For each optimizer: steps, resets, and the step of the last reset. A run that resumes
    with another ``every_n_steps`` counts from its last reset, and resets immediately if that many
    steps have passed.

    **Cost.** Negligible: two Python calls per step and one pass through the moments per reset.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.MomentumReset
                  init_args:
                    every_n_steps: 500

    References:
        Huang et al., "SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training", 2025,
        arXiv 2501.06842, algorithm 1. The length and shape of the warm-up match its released
        code; the limit to half of every_n_steps is an addition of this library.
    """

    namespace: ClassVar[str] = "grad/momentum_reset"
    compatibility: ClassVar[Compatibility] = OptimizerCallback.compatibility.but(
        fp16=yes("Steps that overflow are not counted."),
        no_second_moment=no(
            "sets the moments (exp_avg, exp_avg_sq) of an Adam-like optimizer to zero, and {} keeps none",
            "Train with Adam or AdamW, or drop the callback",
        ),
    )
    trial: ClassVar[Mapping[str, Any]] = {"every_n_steps": 5, "warmup_steps": 3}
    neutral: ClassVar[Mapping[str, Any] | str] = {"every_n_steps": 10**6}

    _steps = until_next_fit.of(OptimizerCounts).saved()
    _last = until_next_fit.of(OptimizerCounts).saved()  # the step of the last reset, from 1
    _resets = until_next_fit.of(OptimizerCounts).saved()
    _without = during_fit.of(list[ValueError])  # the reasons for skipping optimizers

    def __init__(self, every_n_steps: int = 500, warmup_steps: int | None = None, name: str | None = None) -> None:
        super().__init__(name)
        self.every_n_steps = check_count(every_n_steps, 1, "every_n_steps")
        self.warmup_steps = min(_LONGEST_DEFAULT, every_n_steps // 2) if warmup_steps is None else warmup_steps
        check_count(self.warmup_steps, 0, "warmup_steps")
        if self.warmup_steps >= every_n_steps:
            raise ValueError(
                "warmup_steps must be below every_n_steps, or the learning rate never recovers; got "
                f"warmup_steps={warmup_steps} and every_n_steps={every_n_steps}. Omit it to use half of every_n_steps."
            )

    # The fit begins.

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.fitting and sum(hasattr(c, "steps_since_reset") for c in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise ValueError("Use only one MomentumReset per Trainer: two would overwrite each other's learning rates.")

    @override
    def acts_on(self, index: int, optimizer: Optimizer) -> bool:
        if kind := lacking(optimizer, "exp_avg_sq"):
            self._without.append(self.compatibility.no_second_moment.error(self.display_name, kind))
            return False
        return True

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if self._without and not self.watched:
            raise self._without[0]
        if self._without:
            self.say(f"skips an optimizer: {str(self._without[0]).rstrip('.')}")
        names = ", ".join(type(optimizer).__name__ for optimizer in self.watched.values())
        slow = (
            f", and reduces the learning rate for {self.warmup_steps} steps after each reset"
            if self.warmup_steps
            else ""
        )
        words = f"resets the moments of {names} every {self.every_n_steps} steps{slow}"
        self.announce(words, "optimizers", [f"optimizers[{index}]" for index in self.watched])

    # One optimizer step.

    def steps_since_reset(self, index: int) -> int | None:
        """Return the number of steps since the last reset of an optimizer; 0 if the current step resets it.

        Args:
            index: Number of the optimizer.

        Returns:
            int: The number of steps, or ``None`` before the first reset.
        """
        last = self._last[index]
        since = self._steps[index] + 1 - last
        if since >= self.every_n_steps:
            return 0
        return since if last else None

    @override
    def before_step(self, index: int, optimizer: Optimizer) -> None:
        since = self.steps_since_reset(index)
        if since == 0:
            self.reset_moments(index)
        if since is not None:
            self.multiply_rates(index, reset_warmup(since, self.warmup_steps))

    @override
    def after_step(self, index: int, optimizer: Optimizer) -> None:
        was_reset = self.steps_since_reset(index) == 0
        self._steps[index] += 1
        if was_reset:
            self._last[index] = self._steps[index]
            self._resets[index] += 1

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if is_log_step(trainer):
            for index, steps in self._steps.items():
                last = self._last[index]
                factor = reset_warmup(steps - last, self.warmup_steps) if last else 1.0
                values = {"lr_factor": factor, "resets": float(self._resets[index])}
                self.log_scalars(pl_module, {self.quantity_of(index, key): value for key, value in values.items()})
