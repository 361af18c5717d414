"""Steps of optimizers: preconditioned gradients and steps without gradients."""

from lightning_grad.functional.optimizers.tract import precondition, train_activations
from lightning_grad.functional.optimizers.zeroth_order import move_along_

__all__ = ["move_along_", "precondition", "train_activations"]
