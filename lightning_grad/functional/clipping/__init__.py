"""Rules on gradients before a step: clip, normalize, centralize, add noise, skip."""

from lightning_grad.functional.clipping.clipping import (
    clip_adaptively_,
    clip_layers_,
    clip_norm_,
    clip_spikes_,
    clip_to_threshold_,
    clip_value_,
    layer_limits,
    normalize_layers_,
    total_norm,
)
from lightning_grad.functional.clipping.conditioning import (
    add_gradient_noise_,
    centralize_,
    noise_deviation,
    nonfinite,
    reset_moments_,
    reset_warmup,
)
from lightning_grad.functional.clipping.norm_statistics import (
    autoclip_state,
    autoclip_threshold_,
    zclip_state,
    zclip_threshold_,
)

__all__ = [
    "add_gradient_noise_",
    "autoclip_state",
    "autoclip_threshold_",
    "centralize_",
    "clip_adaptively_",
    "clip_layers_",
    "clip_norm_",
    "clip_spikes_",
    "clip_to_threshold_",
    "clip_value_",
    "layer_limits",
    "noise_deviation",
    "nonfinite",
    "normalize_layers_",
    "reset_moments_",
    "reset_warmup",
    "total_norm",
    "zclip_state",
    "zclip_threshold_",
]
