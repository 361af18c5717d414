"""Statistics of gradients and optimizer moments."""

from lightning_grad.functional.diagnostics.gradient_statistics import (
    gradient_cosine,
    moment_signal_to_noise,
    noise_scale_terms,
    zero_share,
)

__all__ = ["gradient_cosine", "moment_signal_to_noise", "noise_scale_terms", "zero_share"]
