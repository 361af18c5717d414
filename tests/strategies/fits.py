"""Fits of the small project with a strategy on each rank, and what they leave behind."""

import copy
from typing import Any

import torch.distributed as dist

from lightning_grad.testing import fit, make_classifier, state_of


def train_on_ranks(strategy: Any, callbacks: Any = (), module: Any = None, **arguments: Any) -> Any:
    """Fit the small classifier on this rank and its peers; return (trainer, module). Its loader continues in mid-epoch."""
    module = make_classifier(optimizer="sgd") if module is None else module
    defaults = {"devices": dist.get_world_size(), "max_epochs": 3, "resumable": True}
    return fit(list(callbacks), module, strategy=strategy, **{**defaults, **arguments})


def outcome(trainer: Any, module: Any) -> dict[str, Any]:
    """Return all that a run leaves behind on this rank, what its strategy keeps included."""
    strategy = trainer.strategy
    state = copy.deepcopy({**state_of(trainer, module), "steps": trainer.global_step})
    state.pop("random")  # Lightning restores no random state
    if hasattr(strategy, "memory"):
        state["memory"] = copy.deepcopy(strategy.memory)
        state["sent"] = [strategy.ledger.steps, strategy.ledger.sent_bytes, strategy.ledger.dense_bytes]
    return state


def finish(strategy: Any, callbacks: Any = (), **arguments: Any) -> dict[str, Any]:
    """Fit, and return what that left behind."""
    return outcome(*train_on_ranks(strategy, callbacks, **arguments))
