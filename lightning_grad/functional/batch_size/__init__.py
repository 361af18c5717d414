"""Batch size: what it changes, and how large it should be."""

from lightning_grad.functional.batch_size.adaptive_batch_size import next_accumulation, norm_test_batch_size
from lightning_grad.functional.batch_size.batch_size_lr_scaling import lr_scaling_factor, lr_scaling_rule
from lightning_grad.functional.batch_size.ghost_batch_norm import ghost_batch_norm

__all__ = ["ghost_batch_norm", "lr_scaling_factor", "lr_scaling_rule", "next_accumulation", "norm_test_batch_size"]
