"""The values of many small weights from one joined call in place of a call for each weight.

In a network of many small layers, a product for each weight costs more than the layer. So the first
weight that a training step uses gets its value from a joined call for all small weights, and the
others get theirs from the same call. Only the first use of a weight does so; every other use
computes its own value. The gradients of all joined weights arrive together, after the whole backward
pass. So weights are not joined where that would make a difference:

- with several processes, which exchange gradients during the backward pass;
- if a weight has a gradient hook, which would run with ``None`` where a step did not use the weight;
- in quiet runs, whose graph is read, and under ``torch.compile`` and ``torch.func``;
- under hooks on saved tensors, such as a checkpointed forward pass, which is compared with its
  repetition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_grad.core.quiet import is_quiet

if TYPE_CHECKING:
    from lightning_grad.core.weights import WeightCallback

_MOST = 1 << 15  # entries of a weight; for a larger one, a call of its own costs little
# Older versions of torch lack this function, so nothing is joined there.
_saved_tensor_hooks: Callable[[bool], Any] = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: True
)


class JointValues:
    """Computes the values of all small weights of a module when a training step uses the first of them.

    Args:
        trainer: The trainer.
        pl_module: Its module.
        techniques: Returns the techniques that change weights now.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        techniques: Callable[[], Sequence[WeightCallback[Any]]],
    ) -> None:
        self._pl_module = pl_module
        self._techniques = techniques
        self._can_join = trainer.world_size == 1
        self._values: dict[int, tuple[Tensor, int]] = {}  # with the version of the parameter
        self._is_due = self._in_step = False
        self._unused: set[int] = set()

    def around(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a training step; its first use of a weight computes the values."""
        self._values.clear()
        self._is_due = self._in_step = self._can_join
        try:
            return inner(*args, **kwargs)
        finally:
            self._in_step = False
            self.drop()

    def drop(self) -> None:
        """Drop the values that were not used, because weights changed or the step ended. Their weights join no more."""
        self._unused.update(self._values)
        self._values.clear()
        self._is_due = self._in_step

    def take(self, parameter: Tensor) -> Tensor | None:
        """Return the value of a parameter at its first use in this step; ``None`` if it must be computed."""
        if torch.compiler.is_compiling():  # a graph must not depend on which use of a weight comes first
            return None
        if not (self._is_due or self._values) or not _can_join_here() or is_quiet(self._pl_module):
            return None
        if self._is_due:
            self._is_due = False
            self._compute()
        value, version = self._values.pop(id(parameter), (None, -1))
        return value if version == parameter._version else None

    def _compute(self) -> None:
        for technique in self._techniques():
            found = [(weight, weight.parameter) for weight in technique.weights if weight.chain.is_alone]
            small = [(weight, parameter) for weight, parameter in found if self._joins(parameter)]
            values = technique.values([weight for weight, _ in small])
            pairs = zip(small, values, strict=False)
            self._values |= {id(p): (value, p._version) for (_, p), value in pairs if value is not None}

    def _joins(self, parameter: nn.Parameter) -> bool:
        return (
            type(parameter) is nn.Parameter
            and parameter.requires_grad
            and not parameter._backward_hooks
            and parameter.numel() <= _MOST
            and id(parameter) not in self._unused
        )


def _can_join_here() -> bool:
    hooked = _saved_tensor_hooks(True) or torch._C._are_functorch_transforms_active()
    return torch.is_grad_enabled() and not hooked
