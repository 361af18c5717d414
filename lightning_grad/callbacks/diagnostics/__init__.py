"""Callbacks that watch a run and change nothing."""

from lightning_grad.callbacks.diagnostics.gradcam import GradCAMLogger
from lightning_grad.callbacks.diagnostics.gradient_diversity import GradientDiversity
from lightning_grad.callbacks.diagnostics.gradient_monitor import GradientMonitor
from lightning_grad.callbacks.diagnostics.hessian_spectrum import HessianSpectrum
from lightning_grad.callbacks.diagnostics.input_gradients import InputGradientLogger
from lightning_grad.callbacks.diagnostics.training_doctor import TrainingDoctor

__all__ = [
    "GradCAMLogger",
    "GradientDiversity",
    "GradientMonitor",
    "HessianSpectrum",
    "InputGradientLogger",
    "TrainingDoctor",
]
