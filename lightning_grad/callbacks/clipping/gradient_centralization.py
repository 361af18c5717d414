"""Gradient centralization: the callback. The rule is :func:`lightning_grad.functional.centralize_`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_grad.callbacks._phases import Phase
from lightning_grad.callbacks.conditioner import GradientConditioner, GradientStep
from lightning_grad.functional import centralize_
from lightning_grad.functional.tensor_lists import joined_norm


class GradientCentralization(GradientConditioner):
    r"""Take the mean from the gradient of each neuron's weights.

    .. math::
        G_i \leftarrow G_i - \frac{1}{M} \sum_{j=1}^{M} G_{ij}

    i counts the first dimension, the outputs of most layers (the inputs of a ConvTranspose); vectors stay as they are. With
    plain SGD the mean of each neuron's weights then never changes. It comes before clipping.

    Args:
        conv_only: Leave Linear and Embedding weights alone, as the released code has for an option.
        include: Names or wildcards of the parameters or modules whose gradients are centralized; default all.
        exclude: Names or wildcards of those that are left alone.
        name: Name of this instance, needed when two are used.

    Raises:
        ValueError: Before the first batch under FSDP1 and DeepSpeed, with a fused optimizer in fp16, for sparse gradients,
            and for a name pattern that matches nothing.

    **Hooks.** ``on_before_optimizer_step``: gradients are accumulated, unscaled and reduced.

    **Logs** under ``grad/centralization/``, at log steps: ``removed`` (share of the squared norm that the means were).

    **State.** None.

    **Cost.** A mean and a difference for each weight.

    **Works with** accumulation, fp16 and bf16, DDP, FSDP2, compiled modules, several optimizers, manual optimization: yes.
    FSDP1 and DeepSpeed: raises.

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
    phase: ClassVar[Phase] = "center"

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
    def _changes(self, parameter: Tensor) -> bool:
        return parameter.ndim > (2 if self.conv_only else 1)

    @override
    def condition(self, step: GradientStep) -> Mapping[str, Tensor | float]:
        if not step.measured:
            centralize_(step.gradients, self.conv_only)
            return {}
        before = joined_norm(step.gradients)
        centralize_(step.gradients, self.conv_only)
        after = joined_norm(step.gradients)
        return {"removed": torch.where(before > 0, 1.0 - (after / before).square(), 0.0)}
