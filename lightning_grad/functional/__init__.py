"""The mathematics of every technique as functions: tensors in, tensors out.

Nothing here knows Lightning, reads a file or keeps a global, so each function also serves a hand-written loop.
"""

from lightning_grad.functional.nm_schedule import (
    RECIPES,
    NMPhase,
    NMSchedule,
    exponential_decay,
    geometric_patterns,
    linear_decay,
    stepwise_patterns,
)
from lightning_grad.functional.nm_sparsity import (
    NMPattern,
    add_sr_ste_,
    gradient_noise,
    is_nm,
    mask_distance,
    nm_mask,
    prune,
    scale_weight,
)

__all__ = [
    "RECIPES",
    "NMPattern",
    "NMPhase",
    "NMSchedule",
    "add_sr_ste_",
    "exponential_decay",
    "geometric_patterns",
    "gradient_noise",
    "is_nm",
    "linear_decay",
    "mask_distance",
    "nm_mask",
    "prune",
    "scale_weight",
    "stepwise_patterns",
]
