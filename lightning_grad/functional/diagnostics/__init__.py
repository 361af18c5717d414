"""Statistics of gradients and optimizer moments, and what a network looks at."""

from lightning_grad.functional.diagnostics.class_answers import ClassAnswers, class_answers
from lightning_grad.functional.diagnostics.gradcam import OutputCapture, activation_maps, feature_map
from lightning_grad.functional.diagnostics.gradient_diversity import gradsign_score, vendi_score
from lightning_grad.functional.diagnostics.gradient_statistics import (
    gradient_cosine,
    learning_rate_sensitivity,
    moment_signal_to_noise,
    noise_scale_terms,
    zero_share,
)
from lightning_grad.functional.diagnostics.hessian_spectrum import (
    HessianProduct,
    Ritz,
    hutchinson_trace,
    lanczos,
    largest_eigenvalues,
    random_signs,
    spectral_density,
    stability_edge,
)
from lightning_grad.functional.diagnostics.input_gradients import DiffRoar, diff_roar, input_saliency, mask_inputs

__all__ = [
    "ClassAnswers",
    "DiffRoar",
    "HessianProduct",
    "OutputCapture",
    "Ritz",
    "activation_maps",
    "class_answers",
    "diff_roar",
    "feature_map",
    "gradient_cosine",
    "gradsign_score",
    "hutchinson_trace",
    "input_saliency",
    "lanczos",
    "largest_eigenvalues",
    "learning_rate_sensitivity",
    "mask_inputs",
    "moment_signal_to_noise",
    "noise_scale_terms",
    "random_signs",
    "spectral_density",
    "stability_edge",
    "vendi_score",
    "zero_share",
]
