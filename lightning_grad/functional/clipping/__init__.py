"""Rules on gradients before a step: clip, normalize, centralize, add noise, skip. One file per technique.

Each function changes the gradients that an optimizer is about to use, in place and without a host sync. On a CPU, some
ask first whether anything changes::

    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    clip_norm_(gradients, max_norm=1.0)

All functions also accept DTensors, with the same result as for the unsharded gradients. The callbacks are in
:mod:`lightning_grad.callbacks.clipping`.
"""

from lightning_grad.functional.clipping.adaptive_gradient_clipping import clip_adaptively_
from lightning_grad.functional.clipping.autoclip import autoclip_state, autoclip_threshold_
from lightning_grad.functional.clipping.gradient_centralization import centralize_
from lightning_grad.functional.clipping.gradient_noise import add_gradient_noise_, noise_deviation
from lightning_grad.functional.clipping.layerwise import clip_layers_, layer_limits, normalize_layers_
from lightning_grad.functional.clipping.momentum_reset import reset_moments_, reset_warmup
from lightning_grad.functional.clipping.norm_clipping import clip_norm_
from lightning_grad.functional.clipping.normalized_gradient import normalize_gradients_
from lightning_grad.functional.clipping.norms import clip_to_threshold_
from lightning_grad.functional.clipping.skip_non_finite import nonfinite
from lightning_grad.functional.clipping.spike_clipping import clip_spikes_
from lightning_grad.functional.clipping.spike_rewind import is_spike
from lightning_grad.functional.clipping.value_clipping import clip_value_
from lightning_grad.functional.clipping.z_loss import squared_log_normalizers, z_loss
from lightning_grad.functional.clipping.zclip import zclip_state, zclip_threshold_
from lightning_grad.functional.gradients.total_norm import total_norm

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
    "is_spike",
    "layer_limits",
    "noise_deviation",
    "nonfinite",
    "normalize_gradients_",
    "normalize_layers_",
    "reset_moments_",
    "reset_warmup",
    "squared_log_normalizers",
    "total_norm",
    "z_loss",
    "zclip_state",
    "zclip_threshold_",
]
