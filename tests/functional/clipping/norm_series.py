"""Norms as a training has them."""

import numpy as np

NAN, INF = float("nan"), float("inf")


def draw(count: int, seed: int = 0, spikes: bool = True) -> list[float]:
    """Return norms as a training has them: drifting down, some far above the rest."""
    generator = np.random.default_rng(seed)
    norms = np.exp(0.3 * generator.standard_normal(count)) * (1.0 + np.exp(-np.arange(count) / 100))
    if spikes:
        norms[generator.random(count) < 0.05] *= 20.0
    return [float(norm) for norm in norms]
