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
    r"""Scale the gradient of each layer to a constant times the norm of its weights (LARS).

    .. math::
        g_h \leftarrow g_h \cdot \min\Bigl(r, \eta \frac{\lVert W_h \rVert}{\lVert g_h \rVert}\Bigr)

    With SGD, each step then moves every layer by the same share of its norm. An optimizer that
    divides by the scale of the gradient (Adam) undoes most of this. A layer with zero weights or a
    zero gradient is not changed.

    Args:
        trust_coefficient: eta, the trust coefficient (0.001 in the paper).
            One number, or a mapping from name patterns to numbers (the first match applies).
            A param group of the optimizer may set its own "trust_coefficient".
        max_ratio: r, the largest factor. None sets no limit, as in LARS.
        vectors: Also normalize parameters of one dimension, such as biases and scales of norms.
            Implementations of LARS do not change them.
        per: A layer is a "module" (its parameters together) or each "parameter".
        include: Names or wildcards of the parameters or modules to normalize. Default: all.
        exclude: Names or wildcards of the parameters or modules not to normalize.
        name: Name of this instance. Required if the Trainer has two of this class.

    Raises:
        ValueError: In the constructor if trust_coefficient or max_ratio is not above 0,
            trust_coefficient is infinite, or per is unknown. Before the first batch under FSDP1 or
            DeepSpeed, with a fused optimizer in fp16, with sparse gradients, or if a name pattern
            matches nothing.

    **Hooks.** ``on_before_optimizer_step``, after gradients are accumulated, unscaled and reduced.

    **Logs** under ``grad/layerwise_normalization/``, at log steps: ``norm`` (before normalization),
    ``least_factor`` and ``largest_factor`` (of all layers).

    **State.** None.

    **Cost.** A norm per gradient and per weight, and one multiplication.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.LayerwiseNormalization
                  init_args:
                    trust_coefficient: 0.001

    References:
        You et al., "Large Batch Training of Convolutional Networks", 2017, arXiv 1708.03888:
        equation 6 without its weight decay, and the coefficient 0.001. Pelikan et al., 2023, arXiv
        2310.00098, use it in federated training.
    """

    namespace: ClassVar[str] = "grad/layerwise_normalization"
    trial: ClassVar[Mapping[str, Any]] = {"trust_coefficient": 0.01, "max_ratio": 10.0}
    neutral: ClassVar[Mapping[str, Any] | str] = "no coefficient keeps the gradient norm of every layer"
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
