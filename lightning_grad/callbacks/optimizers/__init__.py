"""Optimizers: how the gradient of a step is turned into a move of the weights. ``docs/optimizers.md`` helps to choose."""

from lightning_grad.callbacks.optimizers.layerwise_learning_rate_decay import LayerwiseLearningRateDecay
from lightning_grad.callbacks.optimizers.lookahead import Lookahead
from lightning_grad.callbacks.optimizers.optimizer_swap import OptimizerSwap
from lightning_grad.callbacks.optimizers.tract import TrAct
from lightning_grad.callbacks.optimizers.zeroth_order import ZerothOrder

__all__ = ["LayerwiseLearningRateDecay", "Lookahead", "OptimizerSwap", "TrAct", "ZerothOrder"]
