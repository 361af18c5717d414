"""ZClip: the callback. The rule is :func:`lightning_grad.functional.zclip_threshold_`."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_grad.core import GradientConditioner, GradientStep, Role
from lightning_grad.functional import clip_to_threshold_, zclip_state, zclip_threshold_
from lightning_grad.functional.gradients.tensor_lists import joined_norm
from lightning_grad.utilities.checks import check_above, check_between, check_count, check_finite_at_least

_MANY = 0.25  # share of steps; a max_norm that clips more makes the z-score irrelevant
_ENOUGH_STEPS = 50  # before the share is meaningful


class ZClip(GradientConditioner):
    r"""Clip gradients whose norm is an outlier among recent norms.

    .. math::
        z_t = \frac{\lVert g_t \rVert - \mu}{\sigma + \epsilon}, \qquad
        \tau_t = \mu + z^\ast \sigma \cdot \frac{z^\ast}{z_t} \;\text{ where } z_t > z^\ast

    The mean and the standard deviation are exponential averages of the norms after clipping by the
    z-score. The larger a spike, the closer to the mean it is clipped, and the less it changes the
    mean. ``max_norm`` is an additional limit on every step, from the first one on. It is off by
    default, because a limit near the usual norm clips most steps and the z-score then has no
    effect.

    Args:
        z_threshold: z*, the z-score above which a norm is a spike; .inf in YAML disables it.
        alpha: Smoothing factor of the mean and the variance, 0 to 1.
        max_norm: Limit on the norm of every step, well above the usual norm. None sets no limit.
            One number, or a mapping from name patterns to numbers (the first match applies);
            each pattern has its own statistics. A param group of the optimizer may set its own
            "max_norm".
        warmup_steps: Number of first norms from which the mean and variance are initialized.
            Until then only max_norm clips.
        eps: Constant added to the standard deviation.
        include: Names or wildcards of the parameters or modules to clip. Default: all.
        exclude: Names or wildcards of the parameters or modules not to clip.
        name: Name of this instance. Required if the Trainer has two of this class.

    Raises:
        ValueError: In the constructor for arguments outside their range. Before the first batch
            with ``Trainer(gradient_clip_val=...)``, under FSDP1 or DeepSpeed, with a fused
            optimizer in fp16, with sparse gradients, or if a name pattern matches nothing.

    **Hooks.** ``on_before_optimizer_step``, after gradients are accumulated, unscaled and reduced.

    **Logs** under ``grad/zclip/``, at log steps: ``norm`` (before clipping), ``threshold`` (limit
    on the norm; the norm itself if it is not clipped), ``mean``, ``deviation``, and
    ``clipped_share`` (share of all steps so far that were clipped, by either limit). The summary
    also has ``clipped_share``.

    **Warns** once, at a log step or at the end, if ``max_norm`` clips more than a quarter of the steps.

    **State.** Mean, variance and counts of each optimizer. A step with a non-finite norm is not
    clipped and does not change them. In the published code one inf in the warm-up, or one nan after
    it, makes them nan permanently.

    **Cost.** A norm and about thirty scalar operations, without waiting for the device: see
    docs/benchmarks.md.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.ZClip
                  init_args:
                    z_threshold: 2.5

    References:
        Kumar et al., "ZClip: Adaptive Spike Mitigation for LLM Pre-Training", 2025, arXiv
        2504.02507. All defaults match its released code, except for ``max_norm``: its 1.0
        clips 49 to 98 % of the steps of ordinary classifiers.
    """

    namespace: ClassVar[str] = "grad/zclip"
    trial: ClassVar[Mapping[str, Any]] = {"z_threshold": 0.5, "warmup_steps": 3, "max_norm": 0.5}
    neutral: ClassVar[Mapping[str, Any] | str] = {"z_threshold": float("inf"), "max_norm": None}
    role: ClassVar[Role] = "clip"
    threshold_name: ClassVar[str | None] = "max_norm"
    acts_without_threshold: ClassVar[bool] = True

    def __init__(
        self,
        z_threshold: float = 2.5,
        alpha: float = 0.97,
        max_norm: float | Mapping[str, float] | None = None,
        warmup_steps: int = 25,
        eps: float = 1e-6,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(include, exclude, name)
        self.z_threshold = check_above(z_threshold, 0.0, "z_threshold")
        self.alpha = check_between(alpha, 0.0, 1.0, "alpha")
        self.max_norm = self.as_threshold(max_norm)
        self.warmup_steps = check_count(warmup_steps, 1, "warmup_steps")
        self.eps = check_finite_at_least(eps, 0.0, "eps")

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        if self.changed_settings(state, "max_norm"):
            for own in self.states():
                own.pop("bounded", None)  # counts under the old max_norm

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if self.max_norm is not None:
            self.say(f"limits the norm of every step to max_norm={self.max_norm}; None sets no limit")

    @override
    def condition(self, step: GradientStep) -> Mapping[str, Tensor | float]:
        norm = joined_norm(step.gradients)
        if "mean" not in step.state:
            step.state.update(zclip_state(norm.device))
        threshold = zclip_threshold_(norm, step.state, self.z_threshold, self.alpha, None, self.warmup_steps, self.eps)
        if step.threshold is not None:
            is_finite = norm.isfinite()
            bounded = torch.stack([(threshold > step.threshold) & is_finite, is_finite]).long()
            step.state["bounded"] = step.state["bounded"] + bounded if "bounded" in step.state else bounded
            if step.measured:
                self._warn_of_tight_bound(step.state)
            threshold = threshold.clamp(max=step.threshold)
        coefficient = clip_to_threshold_(step.gradients, norm, threshold)
        values = {"norm": norm, "threshold": threshold, "clipped": coefficient < 1.0}
        if step.measured:
            values |= {"mean": step.state["mean"].clone(), "deviation": step.state["variance"].sqrt()}
        return values

    def _warn_of_tight_bound(self, state: Mapping[str, Tensor]) -> None:
        """Warn if max_norm clips many steps. The host waits for the device here, so call it at log steps only."""
        clipped, steps = state["bounded"].tolist() if "bounded" in state else (0, 0)
        if steps >= _ENOUGH_STEPS and clipped > _MANY * steps:
            self.tell_once(
                "bound",
                rank_zero_warn,
                f"max_norm={self.max_norm} clips {clipped / steps:.0%} of the steps so far, so the z-score has little effect. "
                f"Set max_norm=None, or a limit well above the usual norm; the mean is {state['mean'].item():.3g}.",
            )

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        for state in self.states():
            self._warn_of_tight_bound(state)
