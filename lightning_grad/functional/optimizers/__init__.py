"""Steps of optimizers: preconditioned gradients, steps without gradients, and slow weights."""

from lightning_grad.functional.optimizers.lookahead import look_ahead_
from lightning_grad.functional.optimizers.tract import precondition, train_activations
from lightning_grad.functional.optimizers.zeroth_order import move_along_

__all__ = ["look_ahead_", "move_along_", "precondition", "train_activations"]
