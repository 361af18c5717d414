"""Learning rate schedules driven by a measured quantity."""

from lightning_grad.functional.schedules.accuracy_gradient_lr import (
    accuracy_gradient,
    accuracy_gradient_cuts,
    accuracy_gradient_scales,
)

__all__ = ["accuracy_gradient", "accuracy_gradient_cuts", "accuracy_gradient_scales"]
