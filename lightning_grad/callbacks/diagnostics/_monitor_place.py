"""Standing before the first and behind the last of those that change gradients.

Used by ``gradient_monitor.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
from torch.optim import Optimizer

from lightning_grad.core.dispatch import WrapOrder, overrides, wrap_method
from lightning_grad.core.phases import conditioners
from lightning_grad.core.undo import UndoList

_HOOK = "on_before_optimizer_step"

Look = Callable[[Optimizer], None]


@dataclass
class Vantage:
    """Calls functions where the gradients of a step are untouched, about to be clipped, and about to be used.

    Args:
        own: The callback that looks.
        before: Called before anything changes a gradient.
        before_clipping: Called before the first that clips, if something centers gradients before it.
        behind: Called behind the last that changes gradients.
    """

    own: pl.Callback
    before: Look
    before_clipping: Look
    behind: Look
    is_first: bool = False
    may_change: bool = False

    def take(self, trainer: pl.Trainer, pl_module: pl.LightningModule, undo: UndoList) -> None:
        """Find the places in this run, and wrap what stands there."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        acting = [callback for callback in callbacks if overrides(callback, _HOOK)]
        self.is_first = acting[0] is self.own
        if not self.is_first:
            undo.push(wrap_method(acting[0], _HOOK, partial(self._ahead, self.before)))
        phases = [callback.phase for callback in conditioners(trainer)]
        if "center" in phases and "clip" in phases:
            clipper = next(callback for callback in conditioners(trainer) if callback.phase == "clip")
            undo.push(wrap_method(clipper, _HOOK, partial(self._ahead, self.before_clipping)))
        last = "configure_gradient_clipping" if pl_module.automatic_optimization else _HOOK
        undo.push(wrap_method(pl_module, last, self._after, order=WrapOrder.LOOK))
        own_hooks = [overrides(pl_module, name) for name in ("configure_gradient_clipping", _HOOK)]
        self.may_change = len(acting) > 1 or bool(trainer.gradient_clip_val) or any(own_hooks)

    @staticmethod
    def _ahead(
        look: Look, inner: Callable[..., None], trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        look(optimizer)
        inner(trainer, pl_module, optimizer)

    def _after(self, inner: Callable[..., None], optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        inner(optimizer, *args, **kwargs)
        self.behind(optimizer)
