"""Norm clipping: the callback. The rule is :func:`lightning_grad.functional.clip_norm_`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import override

from lightning_grad.core import GradientConditioner, GradientStep, Role, check_above
from lightning_grad.functional import clip_norm_


class NormClipping(GradientConditioner):
    r"""Scale gradients so that their joint norm is at most a constant, for all or parts of a model.

    .. math::
        g \leftarrow g \cdot \min\Bigl(1, \frac{c}{\lVert g \rVert_p + 10^{-6}}\Bigr)

    The result is bitwise the same as with ``Trainer(gradient_clip_val=c)``. It also works where
    Lightning refuses that: with a fused optimizer in bf16-mixed, and in manual optimization. Parts
    of a model can have their own thresholds; each part then has its own norm.

    Args:
        max_norm: c, the largest norm (1.0 in GPT-3: arXiv 2005.14165, appendix B).
            One number, or a mapping from name patterns to numbers (the first match applies).
            A param group of the optimizer may set its own "max_norm".
        norm_type: p, the order of the norm; .inf in YAML for the largest magnitude.
        include: Names or wildcards of the parameters or modules to clip. Default: all.
        exclude: Names or wildcards of the parameters or modules not to clip.
        name: Name of this instance. Required if the Trainer has two of this class.

    Raises:
        ValueError: In the constructor if max_norm or norm_type is not above 0. Before the first
            batch with ``Trainer(gradient_clip_val=...)``, under FSDP1 or DeepSpeed, with a fused
            optimizer in fp16, with sparse gradients, or if a name pattern matches nothing.

    **Hooks.** ``on_before_optimizer_step``, after gradients are accumulated, unscaled and reduced.

    **Logs** under ``grad/norm_clipping/``, at log steps: ``norm`` (before clipping) and
    ``clipped_share`` (share of all steps so far that were clipped). The summary also has
    ``clipped_share``.

    **State.** The number of clipped steps.

    **Cost.** Less than ``torch.nn.utils.clip_grad_norm_``: see docs/benchmarks.md. On a CPU, a step that
    is not clipped costs only the norm.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.NormClipping
                  init_args:
                    max_norm: 1.0

    References:
        Pascanu et al., "On the difficulty of training recurrent neural networks", 2013, arXiv
        1211.5063. The default follows GPT-3 (Brown et al., 2020, arXiv 2005.14165, appendix B).
    """

    namespace: ClassVar[str] = "grad/norm_clipping"
    trial: ClassVar[Mapping[str, Any]] = {"max_norm": 0.1}
    neutral: ClassVar[Mapping[str, Any] | str] = {"max_norm": math.inf}
    role: ClassVar[Role] = "clip"
    threshold_name: ClassVar[str | None] = "max_norm"

    def __init__(
        self,
        max_norm: float | Mapping[str, float] = 1.0,
        norm_type: float = 2.0,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(include, exclude, name)
        self.max_norm = self.as_threshold(max_norm)
        self.norm_type = check_above(norm_type, 0.0, "norm_type")

    @override
    def condition(self, step: GradientStep) -> Mapping[str, Tensor | float]:
        if step.is_idle:
            return {}
        norm = clip_norm_(step.gradients, step.threshold, self.norm_type)
        return {"norm": norm, "clipped": (norm > step.threshold) & norm.isfinite()}
