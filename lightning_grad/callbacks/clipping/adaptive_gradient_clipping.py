"""Adaptive gradient clipping (AGC): the callback. The rule is :func:`lightning_grad.functional.clip_adaptively_`."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_grad.callbacks.clipping._units import LastLayers, UnitConditioner
from lightning_grad.core import GradientStep, Role, check_above, during_fit
from lightning_grad.functional import clip_adaptively_
from lightning_grad.functional.gradients.tensor_lists import whole
from lightning_grad.utilities.parameters import all_names, check_patterns, matches, selects

_LAST_LINEAR = "last Linear"


class AdaptiveGradientClipping(UnitConditioner):
    r"""Clip the gradient of each neuron by the norm of its weights (AGC).

    .. math::
        G_i \leftarrow G_i \frac{m_i}{\lVert G_i \rVert} \text{ where } \lVert G_i \rVert > m_i, \quad
        m_i = \lambda \max(\lVert W_i \rVert, \epsilon)

    i counts units: rows of a Linear, filters of a Conv; a vector is one unit. A layer of another package whose weight is
    (in, out), as the Conv1D of GPT-2 in transformers, is recognized by what it computes; a matrix of which that cannot be told
    is left alone and named. ConvTranspose lays out its weights otherwise, and its units are not neurons.

    Args:
        ratio: lambda, the largest ratio of gradient to weight norm; one number, or one for each name pattern, first
            match first. A param group of the optimizer that carries "ratio" has its own. The paper takes 0.01 at
            batches of 4096, and more at smaller ones.
        eps: epsilon, the least weight norm (1e-3 in the paper), so that weights that are zero can leave zero.
        head: Name or wildcard of the classifier, which is not clipped; "last Linear" is the last linear layer that the first
            batch reaches, in each network of its own (the two of a GAN have two), None clips all.
        include: Names or wildcards of the parameters or modules that are clipped; default all. A matrix whose own name is
            spelled ("mix.w") counts its units first if its layer does not show where they are.
        exclude: Names or wildcards of those that are not.
        name: Name of this instance, needed when two are used.

    Raises:
        ValueError: In the constructor unless ratio and eps are above 0. Before the first batch if there is no Linear and
            head is "last Linear", beside ``Trainer(gradient_clip_val=...)``, under FSDP1 and DeepSpeed, with a fused
            optimizer in fp16, for sparse gradients, and for a name pattern that matches nothing.

    **Hooks.** ``on_before_optimizer_step``: gradients are accumulated, unscaled and reduced. In the first batch hooks on the
    layers see which is reached last.

    **Logs** under ``grad/agc/``, at log steps: ``clipped_units`` (share of units that were clipped in this step) and
    ``least_coefficient`` (how far the most clipped one was).

    **State.** None.

    **Cost.** Two norms a weight; about half of a loop over parameters: see docs/benchmarks.md.

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
    trial: ClassVar[Mapping[str, Any]] = {"ratio": 0.01, "head": None}
    neutral: ClassVar[Mapping[str, Any] | str] = {"ratio": float("inf")}
    role: ClassVar[Role] = "clip"
    threshold_name: ClassVar[str | None] = "ratio"

    _heads = during_fit[LastLayers | None](lambda _: None)

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
        self.ratio = self.as_threshold(ratio)
        self.eps = check_above(eps, 0.0, "eps")
        self.head = head

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.head == _LAST_LINEAR:
            self._heads = LastLayers(trainer, pl_module)
            self.undo.push(self._heads.order.stop)
            if not self._heads.names:
                raise ValueError(
                    f"{self.display_name} leaves the classifier alone, and finds no Linear. Name it by head='...', or "
                    "set head=None."
                )
        super().on_fit_start(trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self._heads is not None:
            self._heads.order.watch()

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        self._learn_heads(trainer, pl_module)
        super().on_before_optimizer_step(trainer, pl_module, optimizer)

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._learn_heads(trainer, pl_module)
        if self._heads is not None:
            self._heads.order.stop()

    def _learn_heads(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._heads is None or not self._heads.learn():
            return
        self.say(f"leaves {', '.join(self._heads.names)} alone: the batch reaches it last")
        self.choose_again(trainer, pl_module)

    @override
    def excluded(self, pl_module: pl.LightningModule) -> list[str]:
        return [*super().excluded(pl_module), *self._head_names(pl_module)]

    @override
    def check_choice(self, pl_module: pl.LightningModule) -> None:
        heads = self._head_names(pl_module)
        own = super().excluded(pl_module)
        others = [names for names in all_names(pl_module).values() if selects(names, self.include, own)]
        if others and all(matches(names, heads) for names in others):
            raise ValueError(
                f"{self.display_name} has nothing to act on besides {', '.join(heads)}, which it leaves alone as the "
                "classifier. Set head=None to clip that too."
            )
        super().check_choice(pl_module)

    def _head_names(self, pl_module: pl.LightningModule) -> list[str]:
        if self._heads is not None:
            return self._heads.names
        if self.head is not None:
            check_patterns(pl_module, self.display_name, head=[self.head])
            return [self.head]
        return []

    @override
    def condition(self, step: GradientStep) -> Mapping[str, Tensor | float]:
        output_dims = self.output_dims(step.parameters)
        coefficients = clip_adaptively_(step.gradients, step.weights, step.threshold, self.eps, output_dims)
        if not step.measured:
            return {}
        units = torch.cat([whole(c).flatten().to(step.gradients[0].device) for c in coefficients])
        return {"clipped_units": (units < 1.0).float().mean(), "least_coefficient": units.min()}
