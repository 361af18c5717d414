"""Which parameters ``GradientMonitor`` watches, and why there may be none."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl
from torch import Tensor
from torch.optim import Optimizer

from lightning_grad.utilities.parameters import all_names, is_chosen, why_none_left
from lightning_grad.utilities.thresholds import choose_buckets


def named_parameters(
    pl_module: pl.LightningModule, optimizer: Optimizer, include: Sequence[str] | None, exclude: Sequence[str] | None
) -> list[tuple[str, Tensor]]:
    """Return the selected parameters that an optimizer moves, with their names."""
    buckets, _ = choose_buckets(optimizer, pl_module, include=include, exclude=exclude)
    return [pair for bucket in buckets for pair in zip(bucket.names, bucket.parameters, strict=True)]


def why_none(
    trainer: pl.Trainer, pl_module: pl.LightningModule, include: Sequence[str] | None, exclude: Sequence[str] | None
) -> str:
    """Return why no parameter is selected, and what to do."""
    everything = [name for o in trainer.optimizers for name, _ in named_parameters(pl_module, o, None, None)]
    if not everything:
        return "configure_optimizers returns no optimizer that holds one. Return one, or drop the callback."
    if any(is_chosen(names, include, exclude) for names in all_names(pl_module).values()):
        return f"No optimizer holds any of those selected. Include some that one holds, such as {everything[0]!r}."
    return why_none_left(pl_module, include, exclude or [])
