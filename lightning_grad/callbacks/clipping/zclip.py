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

_MANY = 0.25  # share of steps; a bound that clips more decides by itself
_ENOUGH_STEPS = 50  # before a share says something


class ZClip(GradientConditioner):
    r"""Clip gradients whose norm is an outlier among those of the last steps.

    .. math::
        z_t = \frac{\lVert g_t \rVert - \mu}{\sigma + \epsilon}, \qquad
        \tau_t = \mu + z^\ast \sigma \cdot \frac{z^\ast}{z_t} \;\text{ where } z_t > z^\ast

    Mean and standard deviation are exponential averages, fed with the norms that the z-score leaves: the larger a spike,
    the closer it is clipped to the mean, and the less it moves it. ``max_norm`` bounds every step besides, from the first one
    on. It is off by default: a bound near the usual norm clips most steps, and the z-score then decides nothing.

    Args:
        z_threshold: z*, from which z-score on a norm is a spike; .inf in YAML for none.
        alpha: Smoothing of mean and variance, 0 to 1.
        max_norm: A bound on every step, above the usual norm; None sets no bound. One number, or one for each name pattern,
            first match first, each with statistics of its own. A param group of the optimizer that carries "max_norm" has
            its own.
        warmup_steps: How many norms make the first mean and variance; until then only max_norm clips.
        eps: Added to the standard deviation.
        include: Names or wildcards of the parameters or modules that are clipped; default all.
        exclude: Names or wildcards of those that are not.
        name: Name of this instance, needed when two are used.

    Raises:
        ValueError: In the constructor for values out of their range. Before the first batch beside
            ``Trainer(gradient_clip_val=...)``, under FSDP1 and DeepSpeed, with a fused optimizer in fp16, for sparse
            gradients, and for a name pattern that matches nothing.

    **Hooks.** ``on_before_optimizer_step``: gradients are accumulated, unscaled and reduced.

    **Logs** under ``grad/zclip/``, at log steps: ``norm`` (before clipping), ``threshold`` (what it may be; the norm itself
    where nothing is clipped), ``mean``, ``deviation``, and ``clipped_share`` (of all steps so far, those that were clipped,
    by either bound); the last also in the summary.

    **Warns** once, at a log step or at the end, if ``max_norm`` clips more than a quarter of the steps.

    **State.** Mean, variance and counts of each optimizer. A norm that is not finite changes none of them, and its step is
    not clipped; in the published code one inf in the warm-up, or one nan after it, makes them nan for ever.

    **Cost.** A norm and some thirty operations on single numbers, none of which waits: see docs/benchmarks.md.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.ZClip
                  init_args:
                    z_threshold: 2.5

    References:
        Kumar et al., "ZClip: Adaptive Spike Mitigation for LLM Pre-Training", 2025, arXiv 2504.02507; all defaults are those
        of its released code, except for ``max_norm``, which is 1.0 there. On ordinary classifiers that clips 49 to 98 % of the
        steps.
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
                own.pop("bounded", None)  # counts of another bound

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if self.max_norm is not None:
            self.say(f"bounds the norm of every step by max_norm={self.max_norm}; None sets no bound")

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
        """Warn if max_norm clips many steps. The host waits for the device, so call it at log steps only."""
        clipped, steps = state["bounded"].tolist() if "bounded" in state else (0, 0)
        if steps >= _ENOUGH_STEPS and clipped > _MANY * steps:
            self.tell_once(
                "bound",
                rank_zero_warn,
                f"max_norm={self.max_norm} clips {clipped / steps:.0%} of the steps so far, so the z-score hardly matters. "
                f"Set max_norm=None, or a bound well above the usual norm; the mean is {state['mean'].item():.3g}.",
            )

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        for state in self.states():
            self._warn_of_tight_bound(state)
