"""Callbacks that make weights sparse."""

from lightning_grad.callbacks.sparsity.nm_sparsity import NMSparsity

__all__ = ["NMSparsity"]
