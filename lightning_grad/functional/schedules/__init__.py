"""Learning rate schedules driven by a measured quantity, and the loss that a schedule will give."""

from lightning_grad.functional.schedules.accuracy_gradient_lr import (
    accuracy_gradient,
    accuracy_gradient_cuts,
    accuracy_gradient_scales,
)
from lightning_grad.functional.schedules.annealing_law import (
    AnnealingConstants,
    LossForecast,
    annealing_areas,
    fit_annealing_law,
    forecast_loss,
)

__all__ = [
    "AnnealingConstants",
    "LossForecast",
    "accuracy_gradient",
    "accuracy_gradient_cuts",
    "accuracy_gradient_scales",
    "annealing_areas",
    "fit_annealing_law",
    "forecast_loss",
]
