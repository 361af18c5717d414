"""Callbacks: one line in ``Trainer(callbacks=[...])`` each.

What all of them share is in ``base.py``, the file to read first.
"""

from lightning_grad.callbacks.nm_sparsity import NMSparsity

__all__ = ["NMSparsity"]
