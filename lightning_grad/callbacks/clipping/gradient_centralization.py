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

    i counts the outputs of the layer, which are in the first dimension of a weight (of a ConvTranspose these are the inputs).
    A layer of another package whose weight is (in, out), as the Conv1D of GPT-2 in transformers, is recognized by what it
    computes; a matrix of which that cannot be told is left alone and named. Vectors stay as they are. With plain SGD the mean
    of each neuron's weights then never changes. It comes before clipping.

    Args:
        conv_only: Leave Linear and Embedding weights alone, as the released code has for an option.
        include: Names or wildcards of the parameters or modules whose gradients are centralized; default all. A matrix
            whose own name is spelled ("mix.w") counts its outputs first if its layer does not show where they are.
        exclude: Names or wildcards of those that are left alone.
        name: Name of this instance, needed when two are used.

    Raises:
        ValueError: Before the first batch under FSDP1 and DeepSpeed, with a fused optimizer in fp16, for sparse gradients,
            and for a name pattern that matches nothing.

    **Hooks.** ``on_before_optimizer_step``: gradients are accumulated, unscaled and reduced.

    **Logs** under ``grad/centralization/``, at log steps: ``removed`` (share of the squared norm that the means were).

    **State.** None.

    **Cost.** A mean and a difference for each weight.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.GradientCentralization

    References:
        Yong et al., "Gradient Centralization: A New Optimization Technique for Deep Neural Networks", 2020,
        arXiv 2004.01461.
    """

    namespace: ClassVar[str] = "grad/centralization"
    trial: ClassVar[Mapping[str, Any]] = {}
    neutral: ClassVar[Mapping[str, Any] | str] = "the mean is taken away whole or not at all"
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
                f"{self.display_name} centralizes weights, and this module has vectors only. Drop the callback."
            )
        if most < 3 and self.conv_only:
            raise ValueError(
                f"{self.display_name}(conv_only=True) centralizes convolutions, and this module has none. Set conv_only=False."
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
