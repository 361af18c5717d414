"""Sharpness: gradients at weights that have moved uphill."""

from lightning_grad.functional.sharpness.sam import ascend_

__all__ = ["ascend_"]
