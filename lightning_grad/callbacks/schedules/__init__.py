"""Learning rates that follow the metrics of a run, and forecasts of what a schedule gives."""

from lightning_grad.callbacks.schedules.accuracy_gradient_lr import AccuracyGradientLR
from lightning_grad.callbacks.schedules.annealing_law import AnnealingLaw

__all__ = ["AccuracyGradientLR", "AnnealingLaw"]
