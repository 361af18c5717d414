"""N:M sparsity: masks, patterns, and schedules that raise the sparsity during a run."""

from lightning_grad.functional.sparsity.nm_schedule import RECIPES, NMPhase, NMSchedule
from lightning_grad.functional.sparsity.nm_sparsity import (
    NMPattern,
    add_sr_ste_,
    is_nm,
    mask_distance,
    masked_gradient_variance,
    nm_mask,
    prune_weight,
    scale_weight,
)

__all__ = [
    "RECIPES",
    "NMPattern",
    "NMPhase",
    "NMSchedule",
    "add_sr_ste_",
    "is_nm",
    "mask_distance",
    "masked_gradient_variance",
    "nm_mask",
    "prune_weight",
    "scale_weight",
]
