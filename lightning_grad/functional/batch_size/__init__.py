"""Batch size: what it changes, and how large it should be."""

from lightning_grad.functional.batch_size.ghost_batch_norm import ghost_batch_norm

__all__ = ["ghost_batch_norm"]
