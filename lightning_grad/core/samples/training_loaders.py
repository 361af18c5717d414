"""Training loaders: which there are, where one of them keeps its batches of indices, and which have none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from lightning_grad.data.fingerprints import ListItems

_BATCHES = (
    "Give the DataLoader a batch_size or a batch_sampler, or a BatchSampler as its sampler, for a data set that takes lists "
    "of indices."
)
_BY_RANK = (
    "If the Trainer put it in the place of a BatchSampler, set use_distributed_sampler=False and make the sampler yourself: "
    "BatchSampler(DistributedSampler(data), size, drop_last)."
)


def keys_of(loaders: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield the key of every loader of a collection, in the order in which Lightning processes them."""
    children: Sequence[tuple[str, Any]] | None = None
    if isinstance(loaders, Mapping):
        children = [(str(key), child) for key, child in loaders.items()]
    elif isinstance(loaders, (list, tuple)):
        children = [(str(position), child) for position, child in enumerate(loaders)]
    if children is None:
        yield ".".join(path)
        return
    for key, child in children:
        yield from keys_of(child, (*path, key))


def refuse_without_indices(loader: Any, needed_by: str) -> None:
    """Raise unless a loader draws lists of indices.

    Raises:
        TypeError: If it is no DataLoader, has no indices, draws them one at a time, or does not keep their order.
    """
    if not isinstance(loader, DataLoader):
        raise TypeError(
            f"{needed_by} needs a torch DataLoader for training, whose batch sampler tells the indices of a batch; got "
            f"{type(loader).__name__}. Return torch.utils.data.DataLoader(dataset, batch_size=...) from train_dataloader."
        )
    if isinstance(loader.dataset, IterableDataset):
        raise TypeError(
            f"{needed_by} needs a data set with __len__ and __getitem__: the samples of the IterableDataset "
            f"{type(loader.dataset).__name__} have no index by which one could be left out. Give its samples a data set with "
            "__len__ and __getitem__."
        )
    if loader.batch_sampler is None and not isinstance(getattr(loader.sampler, "batch_size", None), int):
        shared = isinstance(loader.sampler, DistributedSampler)
        found = f"{type(loader.sampler).__name__}, which has no batch_size"
        raise TypeError(
            f"{needed_by} needs batches of indices, and the sampler of DataLoader(batch_size=None) is {found}. "
            f"{_BY_RANK if shared else _BATCHES}"
        )
    if not getattr(loader, "in_order", True):
        raise TypeError(
            f"{needed_by} must know which samples are in a batch, and DataLoader(in_order=False) does not keep their order. "
            "Leave in_order at True."
        )


def items_of(loader: DataLoader[Any], dataset: Any) -> Any:
    """Return a data set whose samples can be read one by one, also if the loader reads lists of them at once."""
    return ListItems(dataset) if loader.batch_sampler is None else dataset


def slot_of(loader: DataLoader[Any]) -> str:
    """Return which attribute yields lists of indices; with ``batch_size=None`` it is the sampler."""
    return "sampler" if loader.batch_sampler is None else "batch_sampler"


def replace_sampler(loader: DataLoader[Any], sampler: Any) -> None:
    """Make a loader draw its lists of indices from another sampler."""
    # DataLoader refuses to set it. Persistent workers draw from the sampler that they were started with.
    loader.__dict__[slot_of(loader)] = sampler
    if loader._iterator is not None:
        loader._iterator = None
