"""Callbacks: one line in ``Trainer(callbacks=[...])`` each.

What all of them share is in ``base.py``, the file to read first. Those that change gradients stand in ``clipping`` and
share ``conditioner.py``; those that choose or weigh samples in ``data_pruning``.
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
from lightning_grad.callbacks.data_pruning import (
    DataPruning,
    InfoBatch,
    LossReweighting,
    RepeatedRandomSubset,
    UniformLearning,
)
from lightning_grad.callbacks.nm_sparsity import NMSparsity

__all__ = [
    "AdaptiveGradientClipping",
    "AutoClip",
    "DataPruning",
    "GradientCentralization",
    "GradientMonitor",
    "GradientNoise",
    "InfoBatch",
    "LayerwiseClipping",
    "LayerwiseNormalization",
    "LossReweighting",
    "MomentumReset",
    "NMSparsity",
    "NormClipping",
    "RepeatedRandomSubset",
    "SkipNonFinite",
    "SpikeClipping",
    "UniformLearning",
    "ValueClipping",
    "ZClip",
]
