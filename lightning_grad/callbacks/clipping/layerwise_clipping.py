"""Layer-wise clipping: the callback. The rule is :func:`lightning_grad.functional.clip_layers_`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import override

from lightning_grad.core import GradientConditioner, GradientStep, Role, during_fit
from lightning_grad.functional import clip_layers_, layer_limits
from lightning_grad.utilities.layers import LayerFinder, Per


class LayerwiseClipping(GradientConditioner):
    r"""Clip the gradient of each layer to its share of one norm.

    .. math::
        g_h \leftarrow g_h \cdot \min\Bigl(1, \frac{C_h}{\lVert g_h \rVert + 10^{-6}}\Bigr), \qquad
        C_h = \frac{C}{\sqrt H} \;\text{ or }\; C \sqrt{d_h / d}

    A layer with large gradients does not scale down the others, as it does in norm clipping; the total norm stays under C.

    Args:
        max_norm: C, the largest total norm; one number, or one for each name pattern, first match first, each shared out
            over its own layers. A param group of the optimizer that carries "max_norm" has its own.
        weighted: Share C out by the number of entries d_h of each layer, and not equally over the H layers.
        per: A layer is a "module" (its weight and bias together) or each "parameter".
        include: Names or wildcards of the parameters or modules that are clipped; default all.
        exclude: Names or wildcards of those that are not.
        name: Name of this instance, needed when two are used.

    Raises:
        ValueError: In the constructor unless max_norm is above 0, or for an unknown per. Before the first batch beside
            ``Trainer(gradient_clip_val=...)``, under FSDP1 and DeepSpeed, with a fused optimizer in fp16, for sparse
            gradients, and for a name pattern that matches nothing.

    **Hooks.** ``on_before_optimizer_step``: gradients are accumulated, unscaled and reduced.

    **Logs** under ``grad/layerwise_clipping/``, at log steps: ``norm`` (before clipping), ``clipped_layers`` (share of
    layers that were clipped in this step), and ``clipped_share`` (of all steps so far, those in which a layer was clipped);
    the last also in the summary.

    **State.** How many steps were clipped.

    **Cost.** A norm for each tensor, and one product.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.LayerwiseClipping
                  init_args:
                    max_norm: 1.0

    References:
        Pelikan et al., "Federated Learning with Differential Privacy for End-to-End Speech Recognition", 2023,
        arXiv 2310.00098, which clips the updates of clients so; the default of max_norm is ours.
    """

    namespace: ClassVar[str] = "grad/layerwise_clipping"
    trial: ClassVar[Mapping[str, Any]] = {"max_norm": 0.1}
    neutral: ClassVar[Mapping[str, Any] | str] = {"max_norm": math.inf}
    role: ClassVar[Role] = "clip"
    threshold_name: ClassVar[str | None] = "max_norm"

    _layers = during_fit[LayerFinder](lambda self: LayerFinder(self.per))

    def __init__(
        self,
        max_norm: float | Mapping[str, float] = 1.0,
        weighted: bool = False,
        per: Per = "module",
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(include, exclude, name)
        self.max_norm = self.as_threshold(max_norm)
        self.weighted = weighted
        self.per = per

    @override
    def condition(self, step: GradientStep) -> Mapping[str, Tensor | float]:
        layers = self._layers.find(step.names, step.gradients)
        limits = layer_limits(layers.sizes, step.threshold, self.weighted)
        norms, coefficients = clip_layers_(step.gradients, layers.index, limits)
        clipped = coefficients < 1.0
        values: dict[str, Tensor | float] = {"clipped": clipped.any()}
        if step.measured:
            values |= {"norm": norms.square().sum().sqrt(), "clipped_layers": clipped.float().mean()}
        return values
