"""Callbacks that put weights on grids of few bits, in training or at its end."""

from lightning_grad.callbacks.quantization.learned_rounding import LearnedRounding
from lightning_grad.callbacks.quantization.quantization_aware_training import QuantizationAwareTraining

__all__ = ["LearnedRounding", "QuantizationAwareTraining"]
