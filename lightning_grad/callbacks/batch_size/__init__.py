"""Batch size: what large batches change, and how large they should be. ``docs/batch_size.md`` helps to choose."""

from lightning_grad.callbacks.batch_size.adaptive_batch_size import AdaptiveBatchSize
from lightning_grad.callbacks.batch_size.batch_size_lr_scaling import BatchSizeLRScaling
from lightning_grad.callbacks.batch_size.ghost_batch_norm import GhostBatchNorm

__all__ = ["AdaptiveBatchSize", "BatchSizeLRScaling", "GhostBatchNorm"]
