"""Optimizers of a module that is not changed: ``docs/optimizers.md`` helps to choose one."""

from lightning_grad.callbacks.optimizers.optimizer_swap import OptimizerSwap

__all__ = ["OptimizerSwap"]
