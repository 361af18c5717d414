"""Callbacks that train weights on grids of few bits."""

from lightning_grad.callbacks.quantization.quantization_aware_training import QuantizationAwareTraining

__all__ = ["QuantizationAwareTraining"]
