"""Gradient centralization: the callback. The rule is :func:`lightning_grad.functional.centralize_`."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from typing_extensions import override

from lightning_grad.callbacks.clipping._units import UnitConditioner
from lightning_grad.core import GradientStep, Role
from lightning_grad.functional import centralize_
from lightning_grad.functional.gradients.tensor_lists import joined_norm


class GradientCentralization(UnitConditioner):
    r"""Subtract the mean from the gradient of each neuron's weights.

    .. math::
        G_i \leftarrow G_i - \frac{1}{M} \sum_{j=1}^{M} G_{ij}

    i counts the outputs of the layer, in the first dimension of a weight (for a ConvTranspose, that
    is the inputs). The layout of a layer with weights of shape (in, out), such as the Conv1D of
    GPT-2 in transformers, is recognized from what the layer computes. A matrix whose layout cannot
    be recognized is ignored, and the log names it. Vectors are not changed. With plain SGD, the
    mean of each neuron's weights never changes. Centralization comes before clipping.

    Args:
        conv_only: Ignore Linear and Embedding weights, an option of the released code.
        include: Names or wildcards of the parameters or modules to centralize. Default: all.
            If the layout of a matrix cannot be recognized, its full name ("mix.w") makes the first
            dimension count outputs.
        exclude: Names or wildcards of the parameters or modules to ignore.
        name: Name of this instance. Required if the Trainer has two of this class.

    Raises:
        ValueError: Before the first batch under FSDP1 or DeepSpeed, with a fused optimizer in fp16,
            with sparse gradients, if there is no weight to centralize, or if a name pattern matches
            nothing.

    **Hooks.** ``on_before_optimizer_step``, after gradients are accumulated, unscaled and reduced.

    **Logs** under ``grad/centralization/``, at log steps: ``removed`` (share of the squared norm
    that was removed with the means).

    **State.** None.

    **Cost.** A mean and a subtraction per weight.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.GradientCentralization

    References:
        Yong et al., "Gradient Centralization: A New Optimization Technique for Deep Neural
        Networks", 2020, arXiv 2004.01461.
    """

    namespace: ClassVar[str] = "grad/centralization"
    trial: ClassVar[Mapping[str, Any]] = {}
    neutral: ClassVar[Mapping[str, Any] | str] = "the mean is removed completely or not at all"
    role: ClassVar[Role] = "center"

    def __init__(
        self,
        conv_only: bool = False,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(include, exclude, name)
        self.conv_only = conv_only

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._refuse_vectors(pl_module)
        super().on_fit_start(trainer, pl_module)

    def _refuse_vectors(self, pl_module: pl.LightningModule) -> None:
        most = max((p.ndim for p in pl_module.parameters() if not is_lazy(p)), default=3)
        if most < 2:
            raise ValueError(
                f"{self.display_name} centralizes weights, but this module has vectors only. Drop the callback."
            )
        if most < 3 and self.conv_only:
            raise ValueError(
                f"{self.display_name}(conv_only=True) centralizes convolutions, but this module has none. Set conv_only=False."
            )

    @override
    def changes(self, parameter: Tensor) -> bool:
        return parameter.ndim > (2 if self.conv_only else 1)

    @override
    def condition(self, step: GradientStep) -> Mapping[str, Tensor | float]:
        output_dims = self.output_dims(step.parameters)
        if not step.measured:
            centralize_(step.gradients, self.conv_only, output_dims)
            return {}
        before = joined_norm(step.gradients)
        centralize_(step.gradients, self.conv_only, output_dims)
        after = joined_norm(step.gradients)
        return {"removed": torch.where(before > 0, 1.0 - (after / before).square(), 0.0)}
