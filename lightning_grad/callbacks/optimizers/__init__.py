"""Optimizers: how the gradient of a step is turned into a move of the weights."""

from lightning_grad.callbacks.optimizers.tract import TrAct
from lightning_grad.callbacks.optimizers.zeroth_order import ZerothOrder

__all__ = ["TrAct", "ZerothOrder"]
