"""Check that a sampler yields indices of samples, and not keys that only the data set understands.

Samples are identified by their index, 0 to n - 1. Any other key is rejected.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.utils import data

from lightning_grad.data.random_streams import random_streams_kept

# Samplers of torch, and the attribute with the population that each of them draws from.
KNOWN: dict[type, str] = {
    data.SequentialSampler: "data_source",
    data.RandomSampler: "data_source",
    data.WeightedRandomSampler: "weights",
    data.DistributedSampler: "dataset",
    data.SubsetRandomSampler: "indices",
}
_LONGEST = 60  # characters of a key in an error message
_MOST_READ = 10_000_000  # keys to check in one epoch; more would take too long


class KeyReader:
    """Read indices from the keys that a sampler yields.

    Args:
        total: Length of the data set.
        sampler: The sampler, for error messages.
        needed_by: Name of the technique for error messages.

    Example:
        >>> import torch
        >>> reader = KeyReader(4, [], "Pruning")
        >>> reader.batch([2, torch.tensor(3)]), reader.batch(torch.tensor([0, 1]))
        ([2, 3], [0, 1])
        >>> reader.one("cat")
        Traceback (most recent call last):
        TypeError: Pruning identifies samples by index, an integer from 0 to 3, but list yields 'cat'. Let the sampler \
yield integers, and let the data set's __getitem__ look up the rest (an id, a name, a crop).
    """

    def __init__(self, total: int, sampler: Any, needed_by: str) -> None:
        self.total = total
        self._sampler = sampler
        self._needed_by = needed_by

    def batch(self, keys: Any) -> list[int]:
        """Return the indices of a batch.

        Raises:
            TypeError: If the batch is not a list, array or tensor of integers.
            ValueError: If an index is not in the data set.
        """
        if type(keys) is list and all(type(key) is int for key in keys):
            found = list(keys)
        else:
            plain = keys.tolist() if hasattr(keys, "tolist") else keys
            if not isinstance(plain, (list, tuple)):
                raise self._error(TypeError, keys)
            found = [self.one(key) for key in plain]
        if found and not 0 <= min(found) <= max(found) < self.total:
            raise self._error(ValueError, next(key for key in found if not 0 <= key < self.total))
        return found

    def one(self, key: Any) -> int:
        """Return a single key as an index.

        Raises:
            TypeError: If it is not an integer.
            ValueError: If it is not in the data set.
        """
        is_single = hasattr(key, "tolist") and not getattr(key, "shape", (1,))  # a numpy or torch scalar
        plain = key.tolist() if is_single else key
        if type(plain) is not int:
            raise self._error(TypeError, key)
        if not 0 <= plain < self.total:
            raise self._error(ValueError, plain)
        return plain

    def _error(self, kind: type[Exception], key: Any) -> Exception:
        shown = repr(key)
        shown = shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]}..."
        return kind(
            f"{self._needed_by} identifies samples by index, an integer from 0 to {self.total - 1}, but "
            f"{type(self._sampler).__name__} yields {shown}. Let the sampler yield integers, and let the data set's "
            "__getitem__ look up the rest (an id, a name, a crop)."
        )


def refuse_other_keys(original: Any, dataset: Any, needed_by: str, shared: Sequence[Any] = ()) -> None:
    """Raise if a batch sampler yields anything but indices of a data set.

    The keys of torch's own samplers are known. For other samplers, one epoch of a copy is read, which leaves random
    states and the sampler unchanged. A sampler that cannot be copied is not checked here; :class:`KeyReader` then
    checks the keys during training.

    Args:
        original: The batch sampler.
        dataset: The data set; it is not copied with the sampler.
        needed_by: Name of the technique for error messages.
        shared: Further objects that are not copied with the sampler.

    Raises:
        TypeError: If a key is not an integer.
        ValueError: If an index is not in the data set.
    """
    sampler = getattr(original, "sampler", None)
    reader = KeyReader(len(dataset), original if sampler is None else sampler, needed_by)
    known = _known_keys(sampler) if type(original) is data.BatchSampler else None
    if known is not None:
        reader.batch(known)
        return
    with random_streams_kept():
        _read_copy(reader, original, {id(part): part for part in (*_chain(dataset), *shared)})


def _known_keys(sampler: Any) -> Sequence[int] | None:
    """Return the keys that a torch sampler may yield, or only the largest; ``None`` for other samplers."""
    if type(sampler) not in KNOWN:
        return None
    if type(sampler) is data.SubsetRandomSampler:
        return list(sampler.indices)
    length = len(getattr(sampler, KNOWN[type(sampler)]))
    return [length - 1] if length else []


def _read_copy(reader: KeyReader, original: Any, shared: dict[int, Any]) -> None:
    """Check the keys of one epoch of a copied sampler."""
    try:
        batches = iter(copy.deepcopy(original, shared))
    except Exception:  # the sampler cannot be copied, for example because it has an open file or a lock
        return
    read = 0
    for _ in range(len(original)):
        try:
            batch = next(batches)
        except Exception:  # raised by the user's sampler, which will raise it again in training
            return
        read += len(reader.batch(batch))
        if read > _MOST_READ:
            return


def _chain(dataset: Any) -> Iterator[Any]:
    """Yield a data set, and the data sets that it wraps."""
    seen: set[int] = set()
    while dataset is not None and id(dataset) not in seen and not isinstance(dataset, Tensor):
        seen.add(id(dataset))
        yield dataset
        dataset = getattr(dataset, "dataset", None)
