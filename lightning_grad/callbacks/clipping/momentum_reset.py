"""Momentum reset (SPAM): the callback.

The rules are :func:`lightning_grad.functional.reset_moments_` and :func:`lightning_grad.functional.reset_warmup`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import lightning.pytorch as pl
from torch.optim import Optimizer
from typing_extensions import override

from lightning_grad.core.callback import GradCallback
from lightning_grad.functional import reset_moments_, reset_warmup
from lightning_grad.functional.plain_tensors import PlainTensors, on_plain_tensors
from lightning_grad.utilities.checks import check_count, check_keeps, refuse_deepspeed
from lightning_grad.utilities.optimizers import optimizer_index
from lightning_grad.utilities.precision import gradients_are_scaled
from lightning_grad.utilities.reporting import is_log_step

NO_MOMENTS = (
    "sets the moments (exp_avg, exp_avg_sq) of an Adam-like optimizer to zero, and {} keeps none. Train with Adam or AdamW, "
    "or drop the callback."
)

_COUNTS = ("steps", "last", "resets")
_LONGEST_DEFAULT = 150  # steps of warm-up, as in the released code


class MomentumReset(GradCallback):
    r"""Forget the moments of an Adam-like optimizer now and then, and warm the learning rate up again (SPAM).

    .. math::
        m = v = 0 \text{ every } \Delta T \text{ steps, then} \quad
        \mathrm{lr}_k = \mathrm{lr} \cdot \Bigl(1 - 0.99 \cdot \frac{1 + \cos(\pi k / (T + 1))}{2}\Bigr), \quad k < T

    so that a spike that got into the moments does not act for hundreds of steps. Meant for :class:`SpikeClipping` beside
    it, which pauses after each reset.

    Args:
        every: Optimizer steps from one reset to the next.
        warmup: Steps after a reset in which the learning rate is reduced; 0 for none. Default: 150, or half of every if
            that is less.
        name: Name of this instance, in its log keys and its state.

    Raises:
        ValueError: In the constructor unless every is at least 1 and warmup from 0 to below every. Before the first batch
            for a fused optimizer in fp16, if no optimizer keeps ``exp_avg_sq``, for a second instance, and under DeepSpeed.

    **Hooks.** The optimizer's own pre and post hooks, which fire for exactly the steps that are made: one that the
    GradScaler skips is not counted, resets nothing and leaves the learning rate alone; one without gradients (skipped by
    ``SkipNonFinite``) is not counted. The rate is put back in the post hook, before a scheduler reads it.
    ``on_before_optimizer_step`` takes in rates that the closure has set.

    **Logs** under ``grad/momentum_reset/``, at log steps: ``lr_factor`` and ``resets``.

    **State.** Of each optimizer its steps, its resets and the step of the last one. A run that resumes with another
    ``every`` is reset so many steps after its last reset, or at once.

    **Cost.** None worth measuring: two Python calls a step, one pass over the moments at a reset.

    **Works with** accumulation, fp16 and bf16, DDP, FSDP, compiled modules, several optimizers, manual optimization (also
    ``optimizer.step()`` past Lightning): yes. DeepSpeed and optimizers without moments: raises.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.MomentumReset
                  init_args:
                    every: 500

    References:
        Huang et al., "SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training", 2025, arXiv 2501.06842,
        algorithm 1; the warm-up's length and shape are those of its released code. Half of every is ours.
    """

    namespace: ClassVar[str] = "grad/momentum_reset"
    trial: ClassVar[Mapping[str, Any]] = {"every": 5, "warmup": 3}

    def __init__(self, every: int = 500, warmup: int | None = None, name: str | None = None) -> None:
        super().__init__(name)
        check_count(every, 1, "every")
        self.every = every
        self.warmup = min(_LONGEST_DEFAULT, every // 2) if warmup is None else warmup
        check_count(self.warmup, 0, "warmup")
        if self.warmup >= every:
            raise ValueError(
                f"warmup must be below every, or the learning rate never comes back; got warmup={warmup} and every={every}. "
                "Leave warmup out for half of every."
            )
        self._reset()

    def _reset(self) -> None:
        self._steps: dict[int, int] = {}
        self._last: dict[int, int] = {}  # the step of the last reset, from 1
        self._resets: dict[int, int] = {}
        self._factors: dict[int, float] = {}
        self._rates: dict[int, list[tuple[Any, Any]]] = {}

    # The fit begins.

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.fitting:
            self._reset()
            refuse_deepspeed(trainer, self.label)
            if sum(hasattr(c, "steps_since_reset") for c in trainer.callbacks) > 1:  # type: ignore[attr-defined]
                raise ValueError(
                    "Use only one MomentumReset per Trainer: two would overwrite each other's learning rates."
                )

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if self.fitting:
            self._steps, self._last, self._resets = (
                {int(index): count for index, count in state_dict.get(key, {}).items()} for key in _COUNTS
            )

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        without: list[ValueError] = []
        watched: dict[str, str] = {}
        for index, optimizer in enumerate(trainer.optimizers):
            if gradients_are_scaled(trainer, optimizer):
                raise ValueError(
                    f"{self.label} counts the steps that are made, and the fused {type(optimizer).__name__} decides inside "
                    "its step whether the fp16 GradScaler skips it. Use fused=False, or precision='bf16-mixed'."
                )
            try:
                check_keeps(optimizer, "exp_avg_sq", self.label, NO_MOMENTS)
            except ValueError as error:
                without.append(error)
            else:
                self._watch(index, optimizer)
                watched[f"optimizers[{index}]"] = type(optimizer).__name__
        if without and len(without) == len(trainer.optimizers):
            raise without[0]
        if without:
            self.say(f"skips an optimizer: {str(without[0]).rstrip('.')}")
        slow = f", and reduces the learning rate for {self.warmup} steps after each reset" if self.warmup else ""
        words = f"resets the moments of {', '.join(watched.values())} every {self.every} steps{slow}"
        self.announce(words, "optimizers", list(watched))

    def _watch(self, index: int, optimizer: Optimizer) -> None:
        self.undo.push(optimizer.register_step_pre_hook(lambda o, *_: self._before_step(index, o)).remove)
        self.undo.push(optimizer.register_step_post_hook(lambda o, *_: self._after_step(index, o)).remove)
        self.undo.push(lambda: self._restore_rates(index, optimizer))

    # One optimizer step.

    def steps_since_reset(self, index: int) -> int | None:
        """Return how many steps ago an optimizer's moments were reset; 0 for the step that is being made.

        Args:
            index: Number of the optimizer.

        Returns:
            int: The steps, or ``None`` before the first reset.
        """
        last = self._last.get(index, 0)
        since = self._steps.get(index, 0) + 1 - last
        if since >= self.every:
            return 0
        return since if last else None

    def _before_step(self, index: int, optimizer: Optimizer) -> None:
        self._restore_rates(index, optimizer)  # a step that raised never came to its post hook
        since = self.steps_since_reset(index)
        if since is None:
            return
        if since == 0:
            with PlainTensors():
                reset_moments_(list(optimizer.state.values()))
        self._hold_down(index, optimizer, reset_warmup(since, self.warmup))

    def _hold_down(self, index: int, optimizer: Optimizer, factor: float) -> None:
        if factor != 1.0:
            self._factors[index] = factor
            self._rates[index] = [(group["lr"], group["lr"] * factor) for group in optimizer.param_groups]
            for group, (_, low) in zip(optimizer.param_groups, self._rates[index], strict=True):
                group["lr"] = low

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        # A rate that was set inside the closure has replaced ours: it is the rate now, and is held down too.
        index = optimizer_index(trainer, optimizer, self.label)
        for number, group in enumerate(optimizer.param_groups[: len(self._rates.get(index, []))]):
            if group["lr"] is not self._rates[index][number][1]:
                low = group["lr"] * self._factors[index]
                self._rates[index][number] = (group["lr"], low)
                group["lr"] = low

    @on_plain_tensors
    def _after_step(self, index: int, optimizer: Optimizer) -> None:
        self._restore_rates(index, optimizer)
        if any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
            was_reset = self.steps_since_reset(index) == 0
            self._steps[index] = self._steps.get(index, 0) + 1
            if was_reset:
                self._last[index], self._resets[index] = self._steps[index], self._resets.get(index, 0) + 1

    def _restore_rates(self, index: int, optimizer: Optimizer) -> None:
        for group, (rate, low) in zip(optimizer.param_groups, self._rates.pop(index, []), strict=False):
            if group["lr"] is low:  # else somebody has set another since
                group["lr"] = rate

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if is_log_step(trainer):
            for index, steps in self._steps.items():
                prefix = f"optimizer{index}/" if len(trainer.optimizers) > 1 else ""
                last = self._last.get(index, 0)
                factor = reset_warmup(steps - last, self.warmup) if last else 1.0
                self.log_scalars(
                    pl_module, {f"{prefix}lr_factor": factor, f"{prefix}resets": float(self._resets.get(index, 0))}
                )

    @override
    def state_dict(self) -> dict[str, Any]:
        counts = zip(_COUNTS, (self._steps, self._last, self._resets), strict=True)
        own = {key: {str(index): count for index, count in of.items()} for key, of in counts}
        return {**super().state_dict(), **own}
