"""Training loaders: their keys, their batch samplers, and the length of an epoch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.trainer.connectors.data_connector import _parse_num_batches
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from lightning_grad.data.fingerprints import ListItems

_BATCHES = (
    "Set batch_size or batch_sampler of the DataLoader, or, for a data set that takes lists of indices, use a "
    "BatchSampler as its sampler."
)
_BY_RANK = (
    "If the Trainer replaced a BatchSampler with it, set use_distributed_sampler=False and create the sampler yourself: "
    "BatchSampler(DistributedSampler(data), size, drop_last)."
)


def keys_of(loaders: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield the keys of all loaders in a collection, in the order in which Lightning processes them."""
    children = dict(enumerate(loaders)) if isinstance(loaders, (list, tuple)) else loaders
    if not isinstance(children, Mapping):
        yield ".".join(path)
        return
    for key, child in children.items():
        yield from keys_of(child, (*path, str(key)))


def refuse_key(key: str | int | None, keys: Sequence[str], kind: str, needed_by: str) -> None:
    """Raise unless a loader key selects exactly one loader.

    Args:
        key: Key that the user set; ``None`` selects the only loader.
        keys: Result of :func:`keys_of`.
        kind: Kind of loaders, such as "training".
        needed_by: Name of the technique, for errors.

    Raises:
        ValueError: If no loader has the key, or there are several and the key is ``None``.
    """
    known = ", ".join(map(repr, keys))
    if key is None and len(keys) > 1:
        raise ValueError(f"{needed_by} must know which {kind} loader to use. Set loader_key to one of {known}.")
    if key is not None and list(keys) == [""]:
        raise ValueError(
            f"{needed_by}: loader_key={key!r} matches nothing: the only {kind} loader has no key. Remove it."
        )
    if key is not None and str(key) not in keys:
        raise ValueError(f"{needed_by}: loader_key must be one of {known} for the {kind} loaders; got {key!r}.")


def refuse_without_indices(loader: Any, needed_by: str) -> None:
    """Raise unless a loader draws lists of indices.

    Raises:
        TypeError: If it is not a DataLoader, has no indices, draws them one at a time, or does not
            keep their order.
    """
    if not isinstance(loader, DataLoader):
        raise TypeError(
            f"{needed_by} needs a torch DataLoader for training, whose batch sampler yields the indices of each "
            f"batch; got {type(loader).__name__}. Return torch.utils.data.DataLoader(dataset, batch_size=...) from "
            "train_dataloader."
        )
    if isinstance(loader.dataset, IterableDataset):
        raise TypeError(
            f"{needed_by} selects samples by index, but the samples of the IterableDataset "
            f"{type(loader.dataset).__name__} have none. Use a data set with __len__ and __getitem__."
        )
    if loader.batch_sampler is None and not isinstance(getattr(loader.sampler, "batch_size", None), int):
        shared = isinstance(loader.sampler, DistributedSampler)
        found = f"{type(loader.sampler).__name__}, which has no batch_size"
        raise TypeError(
            f"{needed_by} needs batches of indices, but the sampler of DataLoader(batch_size=None) is {found}. "
            f"{_BY_RANK if shared else _BATCHES}"
        )
    if not getattr(loader, "in_order", True):
        raise TypeError(
            f"{needed_by} must know which samples are in a batch, but DataLoader(in_order=False) does not keep their "
            "order. Set in_order=True."
        )


def items_of(loader: DataLoader[Any], dataset: Any) -> Any:
    """Return a data set whose samples can be read one by one, even if the loader reads lists of them."""
    return ListItems(dataset) if loader.batch_sampler is None else dataset


def slot_of(loader: DataLoader[Any]) -> str:
    """Return the attribute of a loader that yields lists of indices; with ``batch_size=None`` it is the sampler."""
    return "sampler" if loader.batch_sampler is None else "batch_sampler"


def replace_sampler(loader: DataLoader[Any], sampler: Any) -> None:
    """Make a loader draw its lists of indices from another sampler."""
    # Through __dict__, because DataLoader refuses to set it. Persistent workers would keep drawing
    # from the sampler that they were started with.
    loader.__dict__[slot_of(loader)] = sampler
    if loader._iterator is not None:
        loader._iterator = None


_INFINITE = float("inf")


class EpochLength:
    """The number of batches in a training epoch of a fit.

    Args:
        trainer: The trainer.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._warned_of_interval = False

    def batches_if(self, length_of: Callable[[Any], float]) -> float:
        """Return how many batches an epoch has if its loaders have the lengths that ``length_of`` returns."""
        loaders = self._trainer.fit_loop._combined_loader
        if loaders is None:
            return _INFINITE
        lengths = [self._limited(length_of(loader)) for loader in loaders.flattened]
        return float(min(lengths) if loaders._mode == "min_size" else max(lengths))

    def update(self) -> None:
        """Update the Trainer's number of batches. Call it before an epoch's first batch."""
        trainer, loop = self._trainer, self._trainer.fit_loop
        loaders = loop._combined_loader
        if loaders is None:
            return
        loaders.limits = [self._limited(length_of(loader)) for loader in loaders.flattened]
        if loaders._iterator is not None:
            loaders._iterator.limits = loaders.limits
        batches = sized_len(loaders)
        loop.max_batches = _INFINITE if batches is None else batches
        if trainer.val_check_batch is None or batches is None:
            return
        if isinstance(trainer.val_check_interval, float):
            trainer.val_check_batch = max(1, int(batches * trainer.val_check_interval))
        elif trainer.check_val_every_n_epoch is not None:
            self._fit_interval(batches)

    def _fit_interval(self, batches: int) -> None:
        trainer = self._trainer
        if trainer.val_check_interval > batches and trainer.enable_validation and not self._warned_of_interval:
            self._warned_of_interval = True
            rank_zero_warn(
                f"val_check_interval={trainer.val_check_interval} exceeds the {batches} batches of a pruned epoch, so "
                "validation runs at the end of each pruned epoch."
            )
        trainer.val_check_batch = min(trainer.val_check_interval, batches)

    def _limited(self, length: float) -> float:
        limit = self._trainer.limit_train_batches
        if isinstance(limit, float) and 0 < limit < 1 and 0 < length < _INFINITE:
            return max(1, int(length * limit))  # in a pruned epoch the share may round to zero batches
        return _parse_num_batches(RunningStage.TRAINING, length, limit)


def length_of(loader: Any) -> float:
    """Return the number of batches of a loader, infinity if it has no length."""
    length = sized_len(loader)
    return _INFINITE if length is None else length
