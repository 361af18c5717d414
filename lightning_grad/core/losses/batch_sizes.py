"""The number of samples in a training batch, by its tensors or, if it holds lists, by the sampler."""

from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader

from lightning_grad.core.subset import SubsetCallback


def batch_size_of(batch: Any, by_sampler: Callable[[], int | None] = lambda: None) -> int | None:
    """Return the number of samples in a batch; ``None`` if its tensors have different lengths.

    In a batch with lists, such as images and their boxes, tensors inside the lists have other
    lengths. Then the sampler's number is returned, if every list and every other tensor has this
    many entries.

    Args:
        batch: The batch.
        by_sampler: Returns the number that the sampler drew, ``None`` if unknown.

    Example:
        >>> import torch
        >>> batch_size_of({"x": torch.zeros(4, 2), "y": torch.zeros(4)}), batch_size_of([torch.zeros(4), torch.zeros(3)])
        (4, None)
        >>> batch_size_of({"images": torch.zeros(2, 3), "boxes": [torch.zeros(1, 4), torch.zeros(5, 4)]}, lambda: 2)
        2
    """
    if _holds_lists(batch):
        number = by_sampler()
        if number is not None and _have_entries(batch, number):
            return number
    sizes = {len(leaf) for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()}
    return sizes.pop() if len(sizes) == 1 else None


def size_by_sampler(trainer: pl.Trainer, batch_idx: int) -> int | None:
    """Return how many samples the sampler drew for a training batch; ``None`` if unknown."""
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader):
        return None
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, SubsetCallback) and callback.indices:
            return len(callback.indices)
    sampler = loader.batch_sampler
    if type(sampler) is not BatchSampler:  # any other sampler may fill its batches differently
        return None
    try:
        left = len(sampler.sampler) - batch_idx * sampler.batch_size  # type: ignore[arg-type]
    except TypeError:
        return None
    return min(sampler.batch_size, left) if left > 0 else None


def _parts(batch: Any) -> list[Any]:
    if isinstance(batch, Mapping):
        return list(batch.values())
    return list(batch) if isinstance(batch, (list, tuple)) else []


def _holds_lists(batch: Any) -> bool:
    return any(
        isinstance(part, (list, tuple)) or (isinstance(part, Mapping) and _holds_lists(part)) for part in _parts(batch)
    )


def _have_entries(batch: Any, number: int) -> bool:
    """Return True if all tensors and lists of a batch, also inside mappings, have this many entries."""
    return all(
        _have_entries(part, number) if isinstance(part, Mapping) else len(part) == number
        for part in _parts(batch)
        if isinstance(part, (list, tuple, Mapping)) or (isinstance(part, Tensor) and part.dim())
    )
