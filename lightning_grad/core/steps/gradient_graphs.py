"""Backward passes that keep the graph of the gradients, for optimizers that differentiate them."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from lightning_grad.core.dispatch import wrap_method
from lightning_grad.core.undo import UndoList


class GradientGraphs:
    """Keeps the graph of the gradients of a step if an optimizer's ``needs_graph`` is True.

    In such a step, attention uses its plain kernel, because the fused ones have no second
    derivatives. All other steps are unchanged.

    Args:
        trainer: The trainer, in ``on_fit_start`` or later.
        optimizers: Returns the optimizers that may need graphs.
    """

    def __init__(self, trainer: pl.Trainer, optimizers: Callable[[], Iterable[Optimizer]]) -> None:
        self._trainer = trainer
        self._optimizers = optimizers

    def watch(self, undo: UndoList) -> None:
        """Wrap the strategy's forward and backward passes."""
        undo.push(self._detach)
        undo.push(wrap_method(self._trainer.strategy, "training_step", self._forward))
        undo.push(wrap_method(self._trainer.strategy, "backward", self._backward))

    @property
    def _is_needed(self) -> bool:
        return any(getattr(optimizer, "needs_graph", False) for optimizer in self._optimizers())

    def _forward(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._is_needed:
            return inner(*args, **kwargs)
        with sdpa_kernel(SDPBackend.MATH):
            return inner(*args, **kwargs)

    def _backward(self, inner: Callable[..., Any], loss: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self._is_needed:
            return inner(loss, *args, **kwargs)
        with warnings.catch_warnings():
            # The optimizer detaches the gradients, which breaks the cycle that torch warns of.
            warnings.filterwarnings("ignore", "Using backward\\(\\) with create_graph=True")
            return inner(loss, *args, **{**kwargs, "create_graph": True})

    def _detach(self) -> None:
        """Free the graphs that an exception left before their step."""
        groups = [group for optimizer in self._optimizers() for group in optimizer.param_groups]
        for weight in (weight for group in groups for weight in group["params"]):
            if weight.grad is not None and weight.grad.requires_grad:
                weight.grad = weight.grad.detach()
