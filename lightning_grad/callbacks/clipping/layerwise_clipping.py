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

    Unlike in norm clipping, a layer with large gradients does not scale down the others. The total
    norm stays below C.

    Args:
        max_norm: C, the largest total norm.
            One number, or a mapping from name patterns to numbers (the first match applies);
            each number is divided over the layers of its pattern. A param group of the optimizer
            may set its own "max_norm".
        weighted: Divide C by layer size instead of equally over the layers.
        per: A layer is a "module" (its weight and bias together) or each "parameter".
        include: Names or wildcards of the parameters or modules to clip. Default: all.
        exclude: Names or wildcards of the parameters or modules not to clip.
        name: Name of this instance. Required if the Trainer has two of this class.

    Raises:
        ValueError: In the constructor if max_norm is not above 0 or per is unknown. Before the
            first batch with ``Trainer(gradient_clip_val=...)``, under FSDP1 or DeepSpeed, with a
            fused optimizer in fp16, with sparse gradients, or if a name pattern matches nothing.

    **Hooks.** ``on_before_optimizer_step``, after gradients are accumulated, unscaled and reduced.

    **Logs** under ``grad/layerwise_clipping/``, at log steps: ``norm`` (before clipping),
    ``clipped_layers`` (share of layers clipped in this step) and ``clipped_share`` (share of all
    steps so far in which a layer was clipped). The summary also has
    ``clipped_share``.

    **State.** The number of clipped steps.

    **Cost.** A norm per tensor and one multiplication; on a CPU only of layers that are clipped.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.LayerwiseClipping
                  init_args:
                    max_norm: 1.0

    References:
        Pelikan et al., "Federated Learning with Differential Privacy for End-to-End Speech
        Recognition", 2023, arXiv 2310.00098, which clips the updates of clients in this way. The
        default of max_norm is a choice of this library.
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
        if step.is_idle:
            return {}
        layers = self._layers.find(step.names, step.gradients)
        limits = layer_limits(layers.sizes, step.threshold, self.weighted)
        norms, coefficients = clip_layers_(step.gradients, layers.index, limits)
        clipped = coefficients < 1.0
        values: dict[str, Tensor | float] = {"clipped": clipped.any()}
        if step.measured:
            values |= {"norm": norms.square().sum().sqrt(), "clipped_layers": clipped.float().mean()}
        return values
