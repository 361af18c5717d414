"""Value clipping: the callback. The rule is :func:`lightning_grad.functional.clip_value_`."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import override

from lightning_grad.core import ELEMENTWISE, Compatibility, GradientConditioner, GradientStep, Role
from lightning_grad.functional import clip_value_
from lightning_grad.functional.gradients.tensor_lists import share_of


class ValueClipping(GradientConditioner):
    r"""Clamp every entry of every gradient to a constant magnitude.

    .. math::
        g_i \leftarrow \max(-c, \min(c, g_i))

    The result is bitwise the same as with ``Trainer(gradient_clip_val=c,
    gradient_clip_algorithm="value")``. The direction of the gradient changes. An infinite entry
    becomes c and a nan stays nan, so put ``SkipNonFinite`` before it.

    Args:
        clip_value: c, the largest magnitude (1.0 is usual in reinforcement learning).
            One number, or a mapping from name patterns to numbers (the first match applies).
            A param group of the optimizer may set its own "clip_value".
        include: Names or wildcards of the parameters or modules to clip. Default: all.
        exclude: Names or wildcards of the parameters or modules not to clip.
        name: Name of this instance. Required if the Trainer has two of this class.

    Raises:
        ValueError: In the constructor if clip_value is not above 0. Before the first batch with
            ``Trainer(gradient_clip_val=...)``, under DeepSpeed, with a fused optimizer in fp16,
            with sparse gradients or complex parameters, or if a name pattern matches nothing.

    **Hooks.** ``on_before_optimizer_step``, after gradients are accumulated, unscaled and reduced.

    **Logs** under ``grad/value_clipping/``, at log steps: ``clipped_entries`` (share of entries at
    the limit).

    **State.** None.

    **Cost.** Two passes through the gradients, as in torch; on a CPU one.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.ValueClipping
                  init_args:
                    clip_value: 0.5

    References:
        Mikolov, "Statistical Language Models Based on Neural Networks", PhD thesis, 2012. Many
        implementations of reinforcement learning use the default of 1.0, but no source justifies
        it.
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
        if step.is_idle:
            return {}
        clip_value_(step.gradients, step.threshold)
        if not step.measured:
            return {}
        return {"clipped_entries": share_of(g.abs() >= step.threshold for g in step.gradients)}
