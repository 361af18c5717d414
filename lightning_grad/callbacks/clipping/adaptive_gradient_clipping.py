"""Adaptive gradient clipping (AGC): the callback. The rule is :func:`lightning_grad.functional.clip_adaptively_`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_grad.callbacks._phases import Phase
from lightning_grad.callbacks.conditioner import GradientConditioner, GradientStep
from lightning_grad.functional import clip_adaptively_
from lightning_grad.functional.tensor_lists import whole
from lightning_grad.utilities.checks import check_above
from lightning_grad.utilities.parameters import check_patterns, clean_name

_LAST_LINEAR = "last Linear"


class AdaptiveGradientClipping(GradientConditioner):
    r"""Clip the gradient of each neuron by the norm of its weights (AGC).

    .. math::
        G_i \leftarrow G_i \frac{m_i}{\lVert G_i \rVert} \text{ where } \lVert G_i \rVert > m_i, \quad
        m_i = \lambda \max(\lVert W_i \rVert, \epsilon)

    i counts units: rows of a Linear, filters of a Conv; a vector is one unit. Layers that lay out their weights otherwise
    (ConvTranspose; query, key and value packed in one weight, whose rows still are neurons) get other units than neurons.

    Args:
        ratio: lambda, the largest ratio of gradient to weight norm; one number, or one for each name pattern, first match
            first. A param group of the optimizer that carries "ratio" has its own.
        eps: epsilon, the least weight norm, so that weights that are zero can leave zero.
        head: Name or wildcard of the classifier, which is not clipped; "last Linear" is the last Linear registered in the
            module, None clips all.
        include: Names or wildcards of the parameters or modules that are clipped; default all.
        exclude: Names or wildcards of those that are not.
        name: Name of this instance, needed when two are used.

    Raises:
        ValueError: In the constructor unless ratio and eps are above 0. Before the first batch if there is no Linear and
            head is "last Linear", beside ``Trainer(gradient_clip_val=...)``, under FSDP1 and DeepSpeed, with a fused
            optimizer in fp16, for sparse gradients, and for a name pattern that matches nothing.

    **Hooks.** ``on_before_optimizer_step``: gradients are accumulated, unscaled and reduced.

    **Logs** under ``grad/agc/``, at log steps: ``clipped_units`` (share of units that were clipped in this step) and
    ``least_coefficient`` (how far the most clipped one was).

    **State.** None.

    **Cost.** Two norms a weight; about half of a loop over parameters: see docs/benchmarks.md.

    **Works with** accumulation, fp16 and bf16, DDP, FSDP2, compiled modules, several optimizers, manual optimization: yes.
    FSDP1 and DeepSpeed: raises.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.AdaptiveGradientClipping
                  init_args:
                    ratio: 0.01

    References:
        Brock et al., "High-Performance Large-Scale Image Recognition Without Normalization", 2021, arXiv 2102.06171,
        section 4: eps 1e-3, and a ratio of 0.01 at batch size 4096 (larger for smaller batches); the head stays unclipped.
    """

    namespace: ClassVar[str] = "grad/agc"
    phase: ClassVar[Phase] = "clip"
    threshold_name: ClassVar[str | None] = "ratio"

    def __init__(
        self,
        ratio: float | Mapping[str, float] = 0.01,
        eps: float = 1e-3,
        head: str | None = _LAST_LINEAR,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(include, exclude, name)
        self.ratio = self._as_threshold(ratio)
        self.eps = eps
        self.head = head
        check_above(eps, 0.0, "eps")

    @override
    def _excluded(self, pl_module: pl.LightningModule) -> list[str]:
        return [*super()._excluded(pl_module), *self._head_names(pl_module)]

    def _head_names(self, pl_module: pl.LightningModule) -> list[str]:
        if self.head is None:
            return []
        if self.head != _LAST_LINEAR:
            check_patterns([self.head], [name for name, _ in pl_module.named_parameters()], "head")
            return [self.head]
        linear = [clean_name(name) for name, module in pl_module.named_modules() if isinstance(module, nn.Linear)]
        if not linear:
            raise ValueError(
                f"{self.label} leaves the classifier alone, and finds no Linear. Name it by head='...', or set head=None."
            )
        return [linear[-1]]

    @override
    def condition(self, step: GradientStep) -> Mapping[str, Tensor | float]:
        coefficients = clip_adaptively_(step.gradients, step.parameters, step.threshold, self.eps)
        if not step.measured:
            return {}
        units = torch.cat([whole(c).flatten().to(step.gradients[0].device) for c in coefficients])
        return {"clipped_units": (units < 1.0).float().mean(), "least_coefficient": units.min()}
