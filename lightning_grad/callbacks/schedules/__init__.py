"""Learning rates that follow what a run measures."""

from lightning_grad.callbacks.schedules.accuracy_gradient_lr import AccuracyGradientLR

__all__ = ["AccuracyGradientLR"]
