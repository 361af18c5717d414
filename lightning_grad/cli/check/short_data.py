"""Loaders that yield only the first batches of the user's data, in the user's own way.

A shortened loader has the class, the collate function and the kind of sampler of the loader that it is made from. Only
its data set and its sampler are shorter, so a pass through the data set is short as well.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from itertools import count, islice
from typing import Any

from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
)

# What a loader does without worker processes, which would take longer to start than a trial runs.
_ONE_PROCESS: Mapping[str, Any] = {
    "num_workers": 0,
    "prefetch_factor": None,
    "persistent_workers": False,
    "timeout": 0,
    "_DataLoader__multiprocessing_context": None,
    "_iterator": None,
}
# Lightning builds loaders again from these, which hold the long data.
_SAVED_BY_LIGHTNING = ("__pl_saved", "__dataset")


def shortened(loaders: Any, batches: int) -> Any:
    """Return loaders that yield at most so many batches.

    Args:
        loaders: A loader, or loaders in lists, mappings and ``CombinedLoader``. What is not a ``DataLoader`` is returned
            as it is.
        batches: Number of batches.

    Example:
        >>> loader = DataLoader(range(1000), batch_size=2)
        >>> [batch.tolist() for batch in shortened(loader, 2)]
        [[0, 1], [2, 3]]
    """
    if isinstance(loaders, CombinedLoader):
        return CombinedLoader(shortened(loaders.iterables, batches), loaders._mode)
    if isinstance(loaders, Mapping):
        return {key: shortened(loader, batches) for key, loader in loaders.items()}
    if isinstance(loaders, list | tuple):
        return [shortened(loader, batches) for loader in loaders]
    return _short_loader(loaders, batches) if isinstance(loaders, DataLoader) else loaders


def _short_loader(loader: DataLoader[Any], batches: int) -> DataLoader[Any]:
    short = copy.copy(loader)
    fields = short.__dict__  # a DataLoader refuses to set its attributes
    fields.update(_ONE_PROCESS)
    for name in [name for name in fields if name.startswith(_SAVED_BY_LIGHTNING)]:
        del fields[name]
    if isinstance(loader.dataset, IterableDataset):
        fields["dataset"] = _first_items(loader.dataset, batches * (loader.batch_size or 1))
    elif type(loader.batch_sampler) is BatchSampler and type(loader.sampler) in (SequentialSampler, RandomSampler):
        _take_first_samples(fields, loader, batches * loader.batch_sampler.batch_size)
    else:
        _take_drawn_samples(fields, loader, batches)
    return short


def _first_items(dataset: Any, most: int) -> Any:
    methods: dict[str, Any] = {"__iter__": lambda _: islice(iter(dataset), most)}
    if hasattr(dataset, "__len__"):
        methods["__len__"] = lambda _: min(most, len(dataset))
    return _like(dataset, **methods) or _FirstItems(dataset, most)


class _FirstItems(IterableDataset[Any]):
    def __init__(self, dataset: Iterable[Any], most: int) -> None:
        self.dataset = dataset
        self.most = most

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.dataset), self.most)


def _take_first_samples(fields: dict[str, Any], loader: DataLoader[Any], most: int) -> None:
    length = min(most, len(loader.dataset))  # type: ignore[arg-type]
    dataset: Any = loader.dataset
    if isinstance(dataset, list | tuple | range):
        dataset = dataset[:length]
    else:
        dataset = _like(dataset, __len__=lambda _: length) or Subset(dataset, range(length))
    sampler: Any = copy.copy(loader.sampler)
    sampler.data_source = dataset
    if getattr(sampler, "_num_samples", None) is not None:
        sampler._num_samples = min(length, sampler._num_samples)
    fields.update(dataset=dataset, sampler=sampler, batch_sampler=_with_sampler(loader.batch_sampler, sampler))


def _with_sampler(batch_sampler: Any, sampler: Any) -> Any:
    changed = copy.copy(batch_sampler)
    changed.sampler = sampler
    return changed


def _take_drawn_samples(fields: dict[str, Any], loader: DataLoader[Any], batches: int) -> None:
    """Draw from the user's sampler once, and yield what it drew in every epoch."""
    by_key = type(loader.batch_sampler) is BatchSampler  # otherwise the sampler yields batches
    slot = "sampler" if by_key or loader.batch_sampler is None else "batch_sampler"
    sampler: Any = getattr(loader, slot)
    drawn = list(islice(iter(sampler), batches * (loader.batch_size or 1) if by_key else batches))
    fields["dataset"], drawn = _only(loader.dataset, drawn)
    methods: dict[str, Any] = {"__iter__": lambda _: iter(drawn)}
    if hasattr(sampler, "__len__"):
        methods["__len__"] = lambda _: len(drawn)
    fields[slot] = _like(sampler, **methods) or drawn
    if by_key:
        fields["batch_sampler"] = _with_sampler(loader.batch_sampler, fields[slot])


def _only(dataset: Any, drawn: list[Any]) -> tuple[Any, list[Any]]:
    """Return a data set of the drawn samples, and their new indices; keys that are not integers stay as they are."""
    kept = [key for keys in drawn for key in (keys if isinstance(keys, list) else [keys])]
    if not all(type(key) is int for key in kept):
        return dataset, drawn

    def old(keys: Any) -> Any:
        return [kept[key] for key in keys] if isinstance(keys, list) else kept[keys]

    methods: dict[str, Any] = {"__len__": lambda _: len(kept), "__getitem__": lambda _, keys: dataset[old(keys)]}
    if hasattr(dataset, "__getitems__"):
        methods["__getitems__"] = lambda _, keys: dataset.__getitems__(old(keys))
    number = count()
    new = [[next(number) for _ in keys] if isinstance(keys, list) else next(number) for keys in drawn]
    return _like(dataset, **methods) or Subset(dataset, kept), new


def _like(thing: Any, **methods: Any) -> Any:
    """Return a copy of an object with other methods, of a class that derives from its class; ``None`` if it has none."""
    kind: Any = type(thing)
    derive: Any = type(kind)
    try:
        twin = copy.copy(thing)
        body = {"__slots__": (), "__module__": kind.__module__, "__doc__": kind.__doc__, **methods}
        twin.__class__ = derive(kind.__name__, (kind,), body)
    except Exception:  # an object of a class that is not written in Python, or that cannot be copied
        return None
    return twin
