"""Statistics of gradients and optimizer moments, and what a network looks at."""

from lightning_grad.functional.diagnostics.class_answers import ClassAnswers, class_answers
from lightning_grad.functional.diagnostics.gradcam import OutputCapture, activation_maps, feature_map
from lightning_grad.functional.diagnostics.gradient_statistics import (
    gradient_cosine,
    moment_signal_to_noise,
    noise_scale_terms,
    zero_share,
)

__all__ = [
    "ClassAnswers",
    "OutputCapture",
    "activation_maps",
    "class_answers",
    "feature_map",
    "gradient_cosine",
    "moment_signal_to_noise",
    "noise_scale_terms",
    "zero_share",
]
