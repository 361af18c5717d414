"""Spike-aware clipping (SPAM): the callback. The rule is :func:`lightning_grad.functional.clip_spikes_`."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_grad.core import GradientStep, Role, check_count, during_fit
from lightning_grad.core.compatibility import Compatibility, no
from lightning_grad.core.conditioner import ELEMENTWISE, GradientConditioner
from lightning_grad.functional import clip_spikes_
from lightning_grad.functional.gradients.tensor_lists import share_of
from lightning_grad.utilities.checks import refuse_projected_moments

_WAY_OUT = "Train with Adam or AdamW, or clip with ZClip or NormClipping"


class SpikeClipping(GradientConditioner):
    r"""Clip gradient entries that are far above their recent size in Adam's second moment (SPAM).

    .. math::
        g_i \leftarrow \operatorname{sign}(g_i) \sqrt{\theta v_i} \quad\text{where}\quad g_i^2 > \theta v_i, \; v_i > 0

    v is the running mean of squares that the optimizer keeps (``exp_avg_sq``). Entries with v = 0
    are not clipped. The published code sets them to zero, which freezes a parameter that gets its
    first gradient late. Use this callback with :class:`MomentumReset`; it pauses after each reset.

    Args:
        threshold: theta, the largest ratio of a squared entry to its mean square.
            5000 in the paper. .inf in YAML never clips. One number, or a mapping from name patterns
            to numbers (the first match applies). A param group of the optimizer may set its
            own "threshold".
        pause: Number of steps without clipping at the start, and from each reset on.
            At the start, the released code clips one step earlier.
        include: Names or wildcards of the parameters or modules to clip. Default: all.
        exclude: Names or wildcards of the parameters or modules not to clip.
        name: Name of this instance. Required if the Trainer has two of this class.

    Raises:
        ValueError: In the constructor if threshold is not above 0 or pause is negative. Before the
            first batch with an optimizer that keeps no ``exp_avg_sq``, with
            ``Trainer(gradient_clip_val=...)``, under DeepSpeed, with a fused optimizer in fp16,
            with sparse gradients or complex parameters, or if a name pattern matches nothing.

    **Hooks.** ``on_before_optimizer_step``, after gradients are accumulated, unscaled and reduced. The
    moments are those from before the step.

    **Logs** under ``grad/spike_clipping/``, at log steps: ``clipped_entries`` (share of entries
    clipped in this step).

    **State.** The number of steps.

    **Cost.** About five passes through the gradients. On a CPU one read of gradients and moments, and
    five passes through pieces that may have a spike.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.MomentumReset
                - class_path: lightning_grad.callbacks.SpikeClipping

    References:
        Huang et al., "SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training", 2025,
        arXiv 2501.06842. The defaults match its released code.
    """

    namespace: ClassVar[str] = "grad/spike_clipping"
    trial: ClassVar[Mapping[str, Any]] = {"threshold": 2.0, "pause": 2}
    neutral: ClassVar[Mapping[str, Any] | str] = {"threshold": float("inf")}
    role: ClassVar[Role] = "clip"
    threshold_name: ClassVar[str | None] = "threshold"
    compatibility: ClassVar[Compatibility] = ELEMENTWISE.but(
        no_second_moment=no(
            "reads the second moment (exp_avg_sq) of an Adam-like optimizer, and {} keeps none",
            _WAY_OUT,
        )
    )

    _resets = during_fit.of(list[Any])

    def __init__(
        self,
        threshold: float | Mapping[str, float] = 5000.0,
        pause: int = 20,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(include, exclude, name)
        self.threshold = self.as_threshold(threshold)
        self.pause = check_count(pause, 0, "pause")

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._resets = [c for c in trainer.callbacks if hasattr(c, "steps_since_reset")]  # type: ignore[attr-defined]

    @override
    def _refuse_optimizer(self, trainer: pl.Trainer, index: int, optimizer: Optimizer) -> None:
        super()._refuse_optimizer(trainer, index, optimizer)
        if self.parameters(index):
            refuse_projected_moments(self.display_name, optimizer, _WAY_OUT)

    @override
    def condition(self, step: GradientStep) -> Mapping[str, Tensor | float]:
        if step.is_idle or self._pauses(step):
            return {}
        states = [step.optimizer.state.get(parameter, {}) for parameter in step.parameters]
        known = [(g, s["exp_avg_sq"]) for g, s in zip(step.gradients, states, strict=True) if "exp_avg_sq" in s]
        if not known:
            return {}
        gradients, moments = [g for g, _ in known], [moment for _, moment in known]
        before = [gradient.clone() for gradient in gradients] if step.measured else []
        clip_spikes_(gradients, moments, step.threshold)
        if not step.measured:
            return {}
        return {"clipped_entries": share_of(g != b for g, b in zip(gradients, before, strict=True))}

    def _pauses(self, step: GradientStep) -> bool:
        since = [reset.steps_since_reset(step.index) for reset in self._resets]
        return step.step < self.pause or any(steps is not None and steps < self.pause for steps in since)
