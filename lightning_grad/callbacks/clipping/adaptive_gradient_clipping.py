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

    i counts units: rows of a Linear, filters of a Conv. A vector is one unit. The layout of a layer
    with weights of shape (in, out), such as the Conv1D of GPT-2 in transformers, is recognized from
    what the layer computes. A matrix whose layout cannot be recognized is ignored, and the log
    names it. The units of a ConvTranspose are its input channels.

    Args:
        ratio: lambda, the largest ratio of gradient norm to weight norm (0.01 in the paper).
            One number, or a mapping from name patterns to numbers (the first match applies).
            A param group of the optimizer may set its own "ratio". The paper uses 0.01 for batches
            of 4096, and larger values for smaller batches.
        eps: epsilon, the smallest weight norm used (1e-3 in the paper).
            It lets weights that are zero become non-zero.
        head: Name or wildcard of the classifier, which is not clipped. None clips everything.
            "last Linear" is the last linear layer that the first batch reaches, one for each
            optimizer (two in a GAN).
        include: Names or wildcards of the parameters or modules to clip. Default: all.
            If the layout of a matrix cannot be recognized, its full name ("mix.w") makes the first
            dimension count units.
        exclude: Names or wildcards of the parameters or modules not to clip.
        name: Name of this instance. Required if the Trainer has two of this class.

    Raises:
        ValueError: In the constructor if ratio or eps is not above 0. Before the first batch if
            head is "last Linear" and there is no Linear, with ``Trainer(gradient_clip_val=...)``,
            under FSDP1 or DeepSpeed, with a fused optimizer in fp16, with sparse gradients, or if a
            name pattern matches nothing.

    **Hooks.** ``on_before_optimizer_step``, after gradients are accumulated, unscaled and reduced.
    In the first batch, hooks on the layers record which one runs last.

    **Logs** under ``grad/agc/``, at log steps: ``clipped_units`` (share of units clipped in this
    step) and ``least_coefficient`` (smallest factor that a unit was multiplied by).

    **State.** None.

    **Cost.** Two norms per weight and a product, on a CPU only for weights with a clipped unit.
    About half the time of a loop over parameters: see docs/benchmarks.md.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.AdaptiveGradientClipping
                  init_args:
                    ratio: 0.01

    References:
        Brock et al., "High-Performance Large-Scale Image Recognition Without Normalization", 2021,
        arXiv 2102.06171, section 4: eps 1e-3, and a ratio of 0.01 at batch size 4096 (larger for
        smaller batches). The head is not clipped.
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
                    f"{self.display_name} does not clip the classifier, but found no Linear. Name it with head='...', or "
                    "set head=None to clip all layers."
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
        self.say(f"does not clip {', '.join(self._heads.names)}, because the batch reaches it last")
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
                f"{self.display_name} has nothing to act on besides {', '.join(heads)}, which it does not clip because it "
                "is the classifier. Set head=None to clip it too."
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
        if step.is_idle:
            return {}
        output_dims = self.output_dims(step.parameters)
        coefficients = clip_adaptively_(step.gradients, step.weights, step.threshold, self.eps, output_dims)
        if not step.measured:
            return {}
        units = torch.cat([whole(c).flatten().to(step.gradients[0].device) for c in coefficients])
        return {"clipped_units": (units < 1.0).float().mean(), "least_coefficient": units.min()}
