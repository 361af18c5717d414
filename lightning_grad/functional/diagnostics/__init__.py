"""What gradients and moments tell about a run."""

from lightning_grad.functional.diagnostics.gradient_statistics import (
    gradient_cosine,
    moment_signal_to_noise,
    noise_scale_terms,
    zero_share,
)

__all__ = ["gradient_cosine", "moment_signal_to_noise", "noise_scale_terms", "zero_share"]
