"""Steps of optimizers: preconditioned gradients, steps without gradients, slow weights, and moments of a part."""

from lightning_grad.functional.optimizers.dct_adamw import dct_adamw_, dct_basis
from lightning_grad.functional.optimizers.frugal import active_rows, frugal_
from lightning_grad.functional.optimizers.galore import (
    galore_adamw_,
    gradient_basis,
    is_settled,
    pack_int4,
    unpack_int4,
)
from lightning_grad.functional.optimizers.layerwise_learning_rate_decay import layer_factors
from lightning_grad.functional.optimizers.lookahead import look_ahead_
from lightning_grad.functional.optimizers.tract import precondition, train_activations
from lightning_grad.functional.optimizers.zeroth_order import move_along_

__all__ = [
    "active_rows",
    "dct_adamw_",
    "dct_basis",
    "frugal_",
    "galore_adamw_",
    "gradient_basis",
    "is_settled",
    "layer_factors",
    "look_ahead_",
    "move_along_",
    "pack_int4",
    "precondition",
    "train_activations",
    "unpack_int4",
]
