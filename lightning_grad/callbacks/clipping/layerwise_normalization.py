"""Layer-wise normalization: the callback. The rule is :func:`lightning_grad.functional.normalize_layers_`."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import override

from lightning_grad.core import GradientConditioner, GradientStep, Role, check_above, during_fit
from lightning_grad.functional import normalize_layers_
from lightning_grad.utilities.checks import check_finite_above
from lightning_grad.utilities.layers import LayerFinder, Per


class LayerwiseNormalization(GradientConditioner):
    r"""Scale the gradient of each layer to the norm of its weights, times a constant (LARS).

    .. math::
        g_h \leftarrow g_h \cdot \min\Bigl(r, \eta \frac{\lVert W_h \rVert}{\lVert g_h \rVert}\Bigr)

    With SGD each step then moves every layer by the same share of its norm. An optimizer that divides by the gradient's own
    scale (Adam) undoes most of it. A layer of zero weights or a zero gradient is left as it is.

    Args:
        trust_coefficient: eta: one number, or one for each name pattern, the first match counts. A param
            group of the optimizer with a "trust_coefficient" uses its own. 0.001 in the paper.
        max_ratio: r, the largest factor; None sets no bound, as in LARS.
        vectors: Also normalise parameters of one dimension (biases, scales of norms), which implementations of LARS leave
            alone.
        per: A layer is a "module" (its parameters together) or each "parameter".
        include: Names or wildcards of the parameters or modules that are normalised; default all.
        exclude: Names or wildcards of those that are not.
        name: Name of this instance, needed when two are used.

    Raises:
        ValueError: In the constructor unless trust_coefficient is finite and above 0 and max_ratio above 0, or for an
            unknown per. Before the first batch under FSDP1 and DeepSpeed, with a fused optimizer in fp16, for sparse
            gradients, and for a name pattern that matches nothing.

    **Hooks.** ``on_before_optimizer_step``: gradients are accumulated, unscaled and reduced.

    **Logs** under ``grad/layerwise_normalization/``, at log steps: ``norm`` (before), ``least_factor``, ``largest_factor``.

    **State.** None.

    **Cost.** A norm for each gradient and each weight, and one product.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.LayerwiseNormalization
                  init_args:
                    trust_coefficient: 0.001

    References:
        You et al., "Large Batch Training of Convolutional Networks", 2017, arXiv 1708.03888, equation 6 without its weight
        decay, and its coefficient 0.001; Pelikan et al., 2023, arXiv 2310.00098, use it in federated training.
    """

    namespace: ClassVar[str] = "grad/layerwise_normalization"
    trial: ClassVar[Mapping[str, Any]] = {"trust_coefficient": 0.01, "max_ratio": 10.0}
    neutral: ClassVar[Mapping[str, Any] | str] = "no coefficient gives every layer the norm that it had"
    role: ClassVar[Role] = "center"
    threshold_name: ClassVar[str | None] = "trust_coefficient"

    _layers = during_fit[LayerFinder](lambda self: LayerFinder(self.per))

    def __init__(
        self,
        trust_coefficient: float | Mapping[str, float] = 0.001,
        max_ratio: float | None = None,
        vectors: bool = False,
        per: Per = "module",
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(include, exclude, name)
        self.trust_coefficient = self.as_threshold(trust_coefficient)
        self.max_ratio = check_above(max_ratio, 0.0, "max_ratio")
        self.vectors = vectors
        self.per = per

    @override
    def check_threshold(self, number: float) -> None:
        check_finite_above(number, 0.0, "trust_coefficient")

    @override
    def changes(self, parameter: Tensor) -> bool:
        return self.vectors or parameter.ndim > 1

    @override
    def condition(self, step: GradientStep) -> Mapping[str, Tensor | float]:
        chosen = step if self.vectors else step.only(lambda gradient: gradient.ndim > 1)
        if not chosen.gradients:
            return {}
        layers = self._layers.find(chosen.names, chosen.gradients)
        norms, factors = normalize_layers_(
            chosen.gradients, chosen.weights, layers.index, len(layers.names), step.threshold, self.max_ratio
        )
        if not step.measured:
            return {}
        norm = norms.square().sum().sqrt()
        return {"norm": norm, "least_factor": factors.min(), "largest_factor": factors.max()}
