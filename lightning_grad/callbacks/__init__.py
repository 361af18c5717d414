"""Callbacks: one line in ``Trainer(callbacks=[...])`` each.

What all of them share is in ``base.py``, the file to read first. Those that change gradients stand in ``clipping`` and
share ``conditioner.py``.
"""

from lightning_grad.callbacks.clipping import (
    AdaptiveGradientClipping,
    AutoClip,
    GradientCentralization,
    GradientMonitor,
    GradientNoise,
    LayerwiseClipping,
    LayerwiseNormalization,
    MomentumReset,
    NormClipping,
    SkipNonFinite,
    SpikeClipping,
    ValueClipping,
    ZClip,
)
from lightning_grad.callbacks.nm_sparsity import NMSparsity

__all__ = [
    "AdaptiveGradientClipping",
    "AutoClip",
    "GradientCentralization",
    "GradientMonitor",
    "GradientNoise",
    "LayerwiseClipping",
    "LayerwiseNormalization",
    "MomentumReset",
    "NMSparsity",
    "NormClipping",
    "SkipNonFinite",
    "SpikeClipping",
    "ValueClipping",
    "ZClip",
]
