"""Sharpness-aware training: steps by gradients that are computed at other weights.

Each derives from :class:`lightning_grad.core.OptimizerCallback`, whose ``evaluate`` may compute the
gradients of a step several times. ``docs/sharpness.md`` helps to choose.
"""

from lightning_grad.callbacks.sharpness.sam import SAM

__all__ = ["SAM"]
