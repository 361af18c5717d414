"""Gradient clipping and conditioning: one rule per file.

Each rule derives from :class:`lightning_grad.core.conditioner.GradientConditioner` (read that
first) and calls a function of :mod:`lightning_grad.functional`; :class:`MomentumReset` derives from
:class:`lightning_grad.core.OptimizerCallback`, and :class:`ZLoss` adds to the loss.
``docs/clipping.md`` helps to choose a rule.
"""

from lightning_grad.callbacks.clipping.adaptive_gradient_clipping import AdaptiveGradientClipping
from lightning_grad.callbacks.clipping.autoclip import AutoClip
from lightning_grad.callbacks.clipping.gradient_centralization import GradientCentralization
from lightning_grad.callbacks.clipping.gradient_noise import GradientNoise
from lightning_grad.callbacks.clipping.layerwise_clipping import LayerwiseClipping
from lightning_grad.callbacks.clipping.layerwise_normalization import LayerwiseNormalization
from lightning_grad.callbacks.clipping.momentum_reset import MomentumReset
from lightning_grad.callbacks.clipping.norm_clipping import NormClipping
from lightning_grad.callbacks.clipping.normalized_gradient import NormalizedGradient
from lightning_grad.callbacks.clipping.skip_non_finite import SkipNonFinite
from lightning_grad.callbacks.clipping.spike_clipping import SpikeClipping
from lightning_grad.callbacks.clipping.spike_rewind import SpikeRewind
from lightning_grad.callbacks.clipping.value_clipping import ValueClipping
from lightning_grad.callbacks.clipping.z_loss import ZLoss
from lightning_grad.callbacks.clipping.zclip import ZClip

__all__ = [
    "AdaptiveGradientClipping",
    "AutoClip",
    "GradientCentralization",
    "GradientNoise",
    "LayerwiseClipping",
    "LayerwiseNormalization",
    "MomentumReset",
    "NormClipping",
    "NormalizedGradient",
    "SkipNonFinite",
    "SpikeClipping",
    "SpikeRewind",
    "ValueClipping",
    "ZClip",
    "ZLoss",
]
