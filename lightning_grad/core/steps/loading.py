"""Loading the checkpoint of a sharded module, for which torch steps the optimizers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from torch.optim import Optimizer

from lightning_grad.core.dispatch import wrap_method


def hide_steps_of_loading(trainer: pl.Trainer) -> Callable[[], None]:
    """Let no step hook run while the strategy loads a checkpoint.

    torch makes the state of an optimizer, into which it loads, by a step without gradients at a learning rate of 0. It is
    no step of the run: techniques must neither count it nor warn of it.

    Returns:
        Callable: Undoes this.
    """

    def load(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # That of DeepSpeed's engine is no torch optimizer, and loading does not step it.
        optimizers: list[Any] = [o for o in trainer.strategy.optimizers if isinstance(o, Optimizer)]
        hooks = [(o._optimizer_step_pre_hooks, o._optimizer_step_post_hooks) for o in optimizers]
        for optimizer in optimizers:
            optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
        try:
            return inner(*args, **kwargs)
        finally:
            for optimizer, (before, after) in zip(optimizers, hooks, strict=True):
                optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks = before, after

    return wrap_method(trainer.strategy, "load_checkpoint", load)
