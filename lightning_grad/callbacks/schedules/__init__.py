"""Learning rates that follow the metrics of a run."""

from lightning_grad.callbacks.schedules.accuracy_gradient_lr import AccuracyGradientLR

__all__ = ["AccuracyGradientLR"]
