"""Value clipping: the callback. The rule is :func:`lightning_grad.functional.clip_value_`."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import override

from lightning_grad.core import ELEMENTWISE, Compatibility, GradientConditioner, GradientStep, Role
from lightning_grad.functional import clip_value_
from lightning_grad.functional.gradients.tensor_lists import share_of


class ValueClipping(GradientConditioner):
    r"""Clamp every entry of every gradient.

    .. math::
        g_i \leftarrow \max(-c, \min(c, g_i))

    It is ``Trainer(gradient_clip_val=c, gradient_clip_algorithm="value")``, bit for bit. The direction of the gradient
    changes. An infinite entry becomes c and a nan stays nan, so put ``SkipNonFinite`` before it.

    Args:
        clip_value: c, the largest magnitude; one number, or one for each name pattern, first match first. A param group
            of the optimizer that carries "clip_value" has its own. 1.0 is usual in reinforcement learning; no source
            argues for it.
        include: Names or wildcards of the parameters or modules that are clipped; default all.
        exclude: Names or wildcards of those that are not.
        name: Name of this instance, needed when two are used.

    Raises:
        ValueError: In the constructor unless clip_value is above 0. Before the first batch beside
            ``Trainer(gradient_clip_val=...)``, under DeepSpeed, with a fused optimizer in fp16, for sparse gradients, and
            for a name pattern that matches nothing.

    **Hooks.** ``on_before_optimizer_step``: gradients are accumulated, unscaled and reduced.

    **Logs** under ``grad/value_clipping/``, at log steps: ``clipped_entries`` (share of entries at the bound).

    **State.** None.

    **Cost.** Two passes over the gradients, as in torch.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.ValueClipping
                  init_args:
                    clip_value: 0.5

    References:
        Mikolov, "Statistical Language Models Based on Neural Networks", PhD thesis, 2012. The default is that of many
        reinforcement learners since; no source argues for it.
    """

    namespace: ClassVar[str] = "grad/value_clipping"
    trial: ClassVar[Mapping[str, Any]] = {"clip_value": 0.001}
    neutral: ClassVar[Mapping[str, Any] | str] = {"clip_value": float("inf")}
    role: ClassVar[Role] = "clip"
    threshold_name: ClassVar[str | None] = "clip_value"
    compatibility: ClassVar[Compatibility] = ELEMENTWISE

    def __init__(
        self,
        clip_value: float | Mapping[str, float] = 1.0,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(include, exclude, name)
        self.clip_value = self.as_threshold(clip_value)

    @override
    def condition(self, step: GradientStep) -> Mapping[str, Tensor | float]:
        clip_value_(step.gradients, step.threshold)
        if not step.measured:
            return {}
        return {"clipped_entries": share_of([g.abs() >= step.threshold for g in step.gradients])}
