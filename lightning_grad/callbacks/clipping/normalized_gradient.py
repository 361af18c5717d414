"""Normalized gradients: the callback. The rule is :func:`lightning_grad.functional.normalize_gradients_`."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor
from typing_extensions import override

from lightning_grad.core import GradientConditioner, GradientStep, Role, during_fit
from lightning_grad.functional import normalize_gradients_
from lightning_grad.utilities.layers import LayerFinder


class NormalizedGradient(GradientConditioner):
    r"""Scale the gradient to norm one, as a whole or for each layer (normalized gradient descent).

    .. math::
        g \leftarrow \frac{g}{\lVert g \rVert} \quad\text{or}\quad g_h \leftarrow \frac{g_h}{\lVert g_h \rVert}

    With SGD, each step then has the length of the learning rate, on plateaus as on cliffs. An
    optimizer that divides by the scale of the gradient (Adam) undoes most of this.

    Args:
        scope: "global" scales all gradients of an optimizer together, "layer" the parameters of each
            module.
        include: Names or wildcards of the parameters or modules to normalize. Default: all.
        exclude: Names or wildcards of the parameters or modules not to normalize.
        name: Name of this instance. Required if the Trainer has two of this class.

    Raises:
        ValueError: In the constructor if scope is unknown. Before the first batch under FSDP1 or
            DeepSpeed, with a fused optimizer in fp16, with sparse gradients, or if a name pattern
            matches nothing.

    **Hooks.** ``on_before_optimizer_step``, after gradients are accumulated, unscaled and reduced.

    **Logs** under ``grad/normalized_gradient/``, at log steps: ``norm`` (before scaling); with
    ``scope="layer"`` also ``least_factor`` and ``largest_factor`` (of all layers).

    **State.** None.

    **Cost.** One norm and one multiplication.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.NormalizedGradient
                  init_args:
                    scope: layer

    References:
        Hazan, Levy and Shalev-Shwartz, "Beyond Convexity: Stochastic Quasi-Convex Optimization",
        NeurIPS 2015, arXiv 1507.02030.
    """

    namespace: ClassVar[str] = "grad/normalized_gradient"
    trial: ClassVar[Mapping[str, Any]] = {"scope": "layer"}
    neutral: ClassVar[Mapping[str, Any] | str] = "no setting keeps the norm of the gradient"
    role: ClassVar[Role] = "clip"

    _layers = during_fit[LayerFinder](lambda _: LayerFinder())

    def __init__(
        self,
        scope: Literal["global", "layer"] = "global",
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(include, exclude, name)
        self.scope = scope

    @override
    def condition(self, step: GradientStep) -> Mapping[str, Tensor | float]:
        if self.scope == "global":
            norm, _ = normalize_gradients_(step.gradients)
            return {"norm": norm}
        layers = self._layers.find(step.names, step.gradients)
        norms, factors = normalize_gradients_(step.gradients, layers.index, len(layers.names))
        if not step.measured:
            return {}
        norm = norms.square().sum().sqrt()
        return {"norm": norm, "least_factor": factors.min(), "largest_factor": factors.max()}
