"""The mathematics of every technique as functions: tensors in, tensors out.

Nothing here knows Lightning, reads a file or keeps a global, so each function also serves a hand-written loop.
"""

from lightning_grad.functional.clipping import (
    clip_adaptively_,
    clip_layers_,
    clip_norm_,
    clip_spikes_,
    clip_to_threshold_,
    clip_value_,
    layer_limits,
    normalize_layers_,
    total_norm,
    unit_norms,
)
from lightning_grad.functional.conditioning import (
    add_gradient_noise_,
    centralize_,
    noise_deviation,
    nonfinite,
    reset_moments_,
    reset_warmup,
)
from lightning_grad.functional.gradient_statistics import (
    gradient_cosine,
    moment_signal_to_noise,
    noise_scale_terms,
    zero_share,
)
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
from lightning_grad.functional.norm_statistics import (
    autoclip_state,
    autoclip_threshold_,
    zclip_state,
    zclip_threshold_,
)

__all__ = [
    "RECIPES",
    "NMPattern",
    "NMPhase",
    "NMSchedule",
    "add_gradient_noise_",
    "add_sr_ste_",
    "autoclip_state",
    "autoclip_threshold_",
    "centralize_",
    "clip_adaptively_",
    "clip_layers_",
    "clip_norm_",
    "clip_spikes_",
    "clip_to_threshold_",
    "clip_value_",
    "exponential_decay",
    "geometric_patterns",
    "gradient_cosine",
    "gradient_noise",
    "is_nm",
    "layer_limits",
    "linear_decay",
    "mask_distance",
    "moment_signal_to_noise",
    "nm_mask",
    "noise_deviation",
    "noise_scale_terms",
    "nonfinite",
    "normalize_layers_",
    "prune",
    "reset_moments_",
    "reset_warmup",
    "scale_weight",
    "stepwise_patterns",
    "total_norm",
    "unit_norms",
    "zclip_state",
    "zclip_threshold_",
    "zero_share",
]
