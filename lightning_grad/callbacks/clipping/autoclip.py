"""AutoClip: the callback. The rule is :func:`lightning_grad.functional.autoclip_threshold_`."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import override

from lightning_grad.core import GradientConditioner, GradientStep, Role, check_between
from lightning_grad.functional import autoclip_state, autoclip_threshold_, clip_to_threshold_
from lightning_grad.functional.gradients.tensor_lists import joined_norm
from lightning_grad.utilities.checks import check_count_between

_MOST_NORMS = 1_000_000  # 8 MB, searched at every step


class AutoClip(GradientConditioner):
    r"""Clip gradients to a percentile of the previous norms.

    .. math::
        g_t \leftarrow g_t \cdot \min\Bigl(1, \frac{\tau_t}{\lVert g_t \rVert}\Bigr), \quad
        \tau_t = \operatorname{percentile}_p(\lVert g_1 \rVert, \ldots, \lVert g_t \rVert)

    It clips most steps, at p = 10 about nine in ten, so it normalizes gradients rather than cutting
    spikes. With an optimizer that divides by the scale of the gradient (Adam) its effect is small.

    Args:
        percentile: p, 0 to 100. 100 never clips.
            One number, or a mapping from name patterns to numbers (the first match applies);
            each pattern has its own norms. A param group of the optimizer may set its own
            "percentile". 10 was the best value in the paper, on source separation.
        window: Number of recent norms to keep, 1 to 1,000,000. The published code keeps all.
        include: Names or wildcards of the parameters or modules to clip. Default: all.
        exclude: Names or wildcards of the parameters or modules not to clip.
        name: Name of this instance. Required if the Trainer has two of this class.

    Raises:
        ValueError: In the constructor if percentile is outside 0 to 100 or window outside 1 to
            1,000,000. Before the first batch with ``Trainer(gradient_clip_val=...)``, under FSDP1
            or DeepSpeed, with a fused optimizer in fp16, with sparse gradients, or if a name
            pattern matches nothing.

    **Hooks.** ``on_before_optimizer_step``, after gradients are accumulated, unscaled and reduced.

    **Logs** under ``grad/autoclip/``, at log steps: ``norm`` (before clipping), ``threshold`` and
    ``clipped_share`` (share of all steps so far that were clipped). The summary also has
    ``clipped_share``.

    **State.** The recent norms of each optimizer. A step with a non-finite norm is not clipped, and
    its norm is ignored.

    **Cost.** A norm and a sort of the window: see docs/benchmarks.md.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.AutoClip
                  init_args:
                    percentile: 10

    References:
        Seetharaman et al., "AutoClip: Adaptive Gradient Clipping for Source Separation Networks",
        2020, arXiv 2007.14469, with 10 as the best percentile. The published code keeps every norm,
        in a list that a single nan corrupts. The window is an addition of this library.
    """

    namespace: ClassVar[str] = "grad/autoclip"
    trial: ClassVar[Mapping[str, Any]] = {"percentile": 10.0, "window": 7}
    neutral: ClassVar[Mapping[str, Any] | str] = {"percentile": 100.0}
    role: ClassVar[Role] = "clip"
    threshold_name: ClassVar[str | None] = "percentile"

    def __init__(
        self,
        percentile: float | Mapping[str, float] = 10.0,
        window: int = 4096,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(include, exclude, name)
        self.percentile = self.as_threshold(percentile)
        self.window = check_count_between(window, 1, _MOST_NORMS, "window")

    @override
    def check_threshold(self, number: float) -> None:
        check_between(number, 0.0, 100.0, "percentile")

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        for own in self.states():
            if "norms" in own and len(own["norms"]) != self.window:
                own.update(_resized(own, self.window))

    @override
    def condition(self, step: GradientStep) -> Mapping[str, Tensor | float]:
        norm = joined_norm(step.gradients)
        if "norms" not in step.state:
            step.state.update(autoclip_state(self.window, norm.device))
        threshold = autoclip_threshold_(norm, step.state, step.threshold)
        coefficient = clip_to_threshold_(step.gradients, norm, threshold)
        return {"norm": norm, "threshold": threshold, "clipped": coefficient < 1.0}


def _resized(state: Mapping[str, Tensor], window: int) -> dict[str, Tensor]:
    """Return the state with its most recent norms in a window of another length."""
    norms, count = state["norms"], int(state["count"])
    in_order = norms.roll(-(count % len(norms))) if count > len(norms) else norms[:count]
    last = in_order[-window:]
    resized = autoclip_state(window, norms.device)
    resized["norms"][: len(last)] = last
    resized["count"].fill_(len(last))
    return resized
