"""The parameters that ``GradientMonitor`` watches, and its hooks before and after all code that changes gradients."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_grad.core.dispatch import WrapOrder, overrides, wrap_method
from lightning_grad.core.roles import conditioners
from lightning_grad.core.undo import UndoList
from lightning_grad.functional.plain_tensors import PlainTensors
from lightning_grad.utilities.parameters import all_names, selects, why_none_left
from lightning_grad.utilities.thresholds import choose_buckets

_HOOK = "on_before_optimizer_step"

Look = Callable[[Optimizer], None]


@dataclass
class Vantage:
    """Calls functions when the gradients of a step are unchanged, about to be clipped, and about to be used.

    Args:
        own: The callback that measures.
        before: Called before anything changes a gradient.
        before_clipping: Called before the first rule that clips, if one that centers precedes it.
        behind: Called after the last change of gradients.
    """

    own: pl.Callback
    before: Look
    before_clipping: Look
    behind: Look
    is_first: bool = False
    may_change: bool = False

    def take(self, trainer: pl.Trainer, pl_module: pl.LightningModule, undo: UndoList) -> None:
        """Find these places in the run, and wrap the hooks there."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        acting = [callback for callback in callbacks if overrides(callback, _HOOK)]
        self.is_first = acting[0] is self.own
        if not self.is_first:
            undo.push(wrap_method(acting[0], _HOOK, partial(self._ahead, self.before)))
        roles = [callback.role for callback in conditioners(trainer)]
        if "center" in roles and "clip" in roles:
            clipper = next(callback for callback in conditioners(trainer) if callback.role == "clip")
            undo.push(wrap_method(clipper, _HOOK, partial(self._ahead, self.before_clipping)))
        last = "configure_gradient_clipping" if pl_module.automatic_optimization else _HOOK
        undo.push(wrap_method(pl_module, last, self._after, order=WrapOrder.LOOK))
        own_hooks = [overrides(pl_module, name) for name in ("configure_gradient_clipping", _HOOK)]
        self.may_change = len(acting) > 1 or bool(trainer.gradient_clip_val) or any(own_hooks)

    @staticmethod
    def _ahead(
        look: Look, inner: Callable[..., None], trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        with torch.no_grad(), PlainTensors():
            look(optimizer)
        inner(trainer, pl_module, optimizer)

    def _after(self, inner: Callable[..., None], optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        inner(optimizer, *args, **kwargs)
        with torch.no_grad(), PlainTensors():
            self.behind(optimizer)


def named_parameters(
    pl_module: pl.LightningModule, optimizer: Optimizer, include: Sequence[str] | None, exclude: Sequence[str] | None
) -> list[tuple[str, Tensor]]:
    """Return the selected parameters of an optimizer, with their names."""
    buckets, _ = choose_buckets(optimizer, pl_module, include=include, exclude=exclude)
    return [pair for bucket in buckets for pair in zip(bucket.names, bucket.parameters, strict=True)]


def why_none(
    trainer: pl.Trainer, pl_module: pl.LightningModule, include: Sequence[str] | None, exclude: Sequence[str] | None
) -> str:
    """Return why no parameter is selected, and what to do."""
    everything = [name for o in trainer.optimizers for name, _ in named_parameters(pl_module, o, None, None)]
    if not everything:
        return "configure_optimizers returns no optimizer with parameters. Return one, or drop the callback."
    if any(selects(names, include, exclude) for names in all_names(pl_module).values()):
        return f"No optimizer holds a selected parameter. Include some that one holds, such as {everything[0]!r}."
    return why_none_left(pl_module, include, exclude or [])
