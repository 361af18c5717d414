"""Callbacks: one line in ``Trainer(callbacks=[...])`` each.

What they are built of is in :mod:`lightning_grad.core`. Those that change gradients stand in ``clipping``; those that choose
or weigh samples in ``data_pruning``; those that attack inputs, and the learning rate made for them, in ``adversarial``.
"""

from lightning_grad.callbacks.adversarial import AccuracyGradientLR, AdversarialEvaluation, AdversarialTraining
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
from lightning_grad.callbacks.sparsity import NMSparsity

__all__ = [
    "AccuracyGradientLR",
    "AdaptiveGradientClipping",
    "AdversarialEvaluation",
    "AdversarialTraining",
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
