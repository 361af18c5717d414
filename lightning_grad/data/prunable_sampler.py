"""A batch sampler that can change its set of samples during training and records the samples of each batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, count, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils import data

from lightning_grad.data.sampler_keys import KNOWN, KeyReader

_NEXT_PASS = 1_000_003  # larger than any epoch number, so that a second pass has its own shuffle


class RecordedBatches(Iterator[list[int]]):
    """Iterator over batches of indices that records each batch.

    Loader workers draw ahead of training, but batches leave the loader in the order in which they were drawn.

    Args:
        batches: Iterator of batches: lists, arrays or tensors, which are passed on unchanged.
        read: Function that returns the indices in a batch.
    """

    def __init__(self, batches: Iterator[Any], read: Callable[[Any], list[int]] = list) -> None:
        self._batches = batches
        self._read = read
        self.drawn: deque[list[int]] = deque()

    def __next__(self) -> list[int]:
        batch: list[int] = next(self._batches)
        self.drawn.append(self._read(batch))
        return batch


class PrunableBatchSampler(data.Sampler[list[int]]):
    r"""Draw batches from the kept samples of a data set, in the way of another batch sampler.

    Until :meth:`keep` is called, its batches are identical to the original batch sampler's. Afterwards, kept samples
    are shuffled, weighted, ordered or split between ranks as by the original sampler, and batches are filled up:

    ============================= ================================================================
    original sampler              order of the kept samples
    ============================= ================================================================
    SequentialSampler             in order
    RandomSampler                 shuffled by its generator, with replacement if it uses replacement
    SubsetRandomSampler           those in its subset, shuffled by its generator
    WeightedRandomSampler         drawn with their weights; dropped samples have weight zero
    DistributedSampler            the list of kept samples, equal on all ranks, is split between ranks
    any other, one process        those that it yields, without the dropped ones
    ============================= ================================================================

    An epoch has exactly ``len(sampler)`` batches. If there are fewer kept samples, for example because ``samples`` is
    more than one pass, they are drawn again in a new order.

    Args:
        original: The original batch sampler.
            Classes other than ``BatchSampler`` need ``batch_size``, the number of samples in a full batch, and
            ``__len__``.
        total: Length of the data set.
        needed_by: Name of the technique for error messages.

    Raises:
        TypeError: If the original has no batch size or length, or is an unknown sampler for several ranks. During
            iteration, if the original yields keys that are not integers.
        ValueError: During iteration, if the original yields an integer that is not an index of the data set.

    Example:
        >>> import torch
        >>> from torch.utils.data import BatchSampler, SequentialSampler
        >>> sampler = PrunableBatchSampler(BatchSampler(SequentialSampler(range(6)), 2, drop_last=False), total=6)
        >>> list(sampler)
        [[0, 1], [2, 3], [4, 5]]
        >>> sampler.keep(torch.tensor([0, 3, 4]))
        >>> list(sampler), len(sampler)
        ([[0, 3], [4]], 2)
        >>> sampler.keep(torch.tensor([0, 3, 4]), samples=5)
        >>> list(sampler)
        [[0, 3], [4, 0], [3]]
    """

    def __init__(self, original: Any, total: int, needed_by: str = "PrunableBatchSampler") -> None:
        _refuse(original, needed_by)
        self.original = original
        self.total = total
        self._needed_by = needed_by
        self.batch_size: int = original.batch_size
        self.drop_last: bool = getattr(original, "drop_last", False)
        self.sampler = getattr(original, "sampler", None)  # Lightning calls its set_epoch
        self._reader = KeyReader(total, original if self.sampler is None else self.sampler, needed_by)
        self.latest = RecordedBatches(iter(()))
        self._kept: Tensor | None = None
        self._samples: int | None = None

    @property
    def shares_are_known(self) -> bool:
        """Whether it is known which samples each rank draws, with equal numbers on all ranks."""
        return type(self.original) is data.BatchSampler and type(self.sampler) in KNOWN

    @property
    def population(self) -> Tensor:
        """Indices of all samples that training may use, ascending; only the subset for a ``SubsetRandomSampler``."""
        if isinstance(self.sampler, data.SubsetRandomSampler):
            return torch.as_tensor(list(self.sampler.indices)).sort().values
        return torch.arange(self.total)

    @property
    def ranks(self) -> int:
        """Number of processes that the samples are split between."""
        return int(self.sampler.num_replicas) if isinstance(self.sampler, data.DistributedSampler) else 1

    @property
    def full_samples(self) -> int:
        """Samples per epoch of this process without pruning."""
        if type(self.original) is data.BatchSampler:
            return len(self.sampler)  # type: ignore[arg-type]
        most = len(self.original) * self.batch_size
        return self.total if abs(most - self.total) < self.batch_size else most  # one pass, up to the last batch

    @property
    def full_length(self) -> int:
        """Batches per epoch without pruning."""
        return len(self.original)

    @property
    def samples(self) -> int:
        """Samples per epoch of this process."""
        if self._kept is None:
            return self.full_samples
        return self._samples if self._samples is not None else len(self._pruned_sampler(0))

    def keep(self, indices: Tensor | Sequence[int] | None, samples: int | None = None) -> None:
        """Draw only from these samples, starting with the next iterator.

        Args:
            indices: Indices in the data set; duplicates are drawn repeatedly. ``None`` keeps all samples.
            samples: Samples per epoch of this process. Default: one pass.

        Raises:
            ValueError: If no sample is kept, or an index is not in the data set.
        """
        if indices is None:
            self._kept, self._samples = None, None
            return
        kept = torch.as_tensor(indices, dtype=torch.int64)
        if not len(kept):
            raise ValueError("At least one sample must be kept; got none.")
        low, high = int(kept.min()), int(kept.max())
        if low < 0 or high >= self.total:
            raise ValueError(f"Indices must be between 0 and {self.total - 1}; got {low} to {high}.")
        self._kept, self._samples = kept, samples

    def __len__(self) -> int:
        if self._kept is None:
            return self.full_length
        return self.samples // self.batch_size if self.drop_last else -(-self.samples // self.batch_size)

    def __getattr__(self, name: str) -> Any:
        # Hooks of the user's module may call methods of their own batch sampler, for example set_epoch.
        if name == "original":
            raise AttributeError(name)
        return getattr(self.original, name)

    def __iter__(self) -> RecordedBatches:
        batches = iter(self.original) if self._kept is None else self._batches()
        self.latest = RecordedBatches(batches, self._reader.batch)
        return self.latest

    def _batches(self) -> Iterator[list[int]]:
        indices = islice(self._passes(), self.samples)
        while batch := list(islice(indices, self.batch_size)):
            if len(batch) == self.batch_size or not self.drop_last:
                yield batch

    def _passes(self) -> Iterator[int]:
        assert self._kept is not None
        for number in count():
            indices = iter(self._pruned_sampler(number))
            first = next(indices, None)
            if first is None:
                raise ValueError(
                    f"{self._needed_by} keeps {len(self._kept)} samples, but {type(self.original).__name__} yields "
                    "none of them. Prune less, or let the sampler yield every sample of the data set."
                )
            yield from chain([first], indices)

    def _pruned_sampler(self, number: int) -> _Subset | _Filtered:
        """Return an iterable over the kept samples for one pass; ``number`` counts the passes of the epoch."""
        assert self._kept is not None
        kept, sampler = self._kept, self.sampler if type(self.original) is data.BatchSampler else None
        positions: Any = range(len(kept))
        if type(sampler) is data.SequentialSampler:
            return _Subset(kept, positions)
        if type(sampler) is data.RandomSampler:
            drawn = _scaled(sampler.num_samples, len(kept), self.total)
            return _Subset(kept, data.RandomSampler(positions, sampler.replacement, drawn, sampler.generator))
        if type(sampler) is data.SubsetRandomSampler:
            kept = kept[torch.isin(kept, self.population)]
            return _Subset(kept, data.SubsetRandomSampler(range(len(kept)), sampler.generator))
        if type(sampler) is data.WeightedRandomSampler:
            weights = sampler.weights[kept]
            drawn = _scaled(sampler.num_samples, len(kept), self.total)
            if not sampler.replacement:
                drawn = min(drawn, int((weights > 0).sum()))  # without replacement, no more can be drawn
            drawing = data.WeightedRandomSampler(weights.tolist(), drawn, sampler.replacement, sampler.generator)
            return _Subset(kept, drawing)
        if type(sampler) is data.DistributedSampler:
            return _Subset(kept, _redistributed(sampler, positions, number))
        counts = torch.bincount(kept, minlength=self.total)
        length = _scaled(self.full_samples, len(kept), self.total)
        if sampler is not None:
            return _Filtered(sampler, lambda key: [self._reader.one(key)], counts, length)
        return _Filtered(self.original, self._reader.batch, counts, length)


class _Subset:
    """The kept samples in the order of a sampler over their positions."""

    def __init__(self, kept: Tensor, sampler: Any) -> None:
        self._kept = kept
        self._sampler = sampler

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[int]:
        kept = self._kept.tolist()
        return (kept[position] for position in self._sampler)


class _Filtered:
    """The samples that an unknown sampler yields, filtered to the kept ones; duplicates come in a second round."""

    def __init__(self, source: Any, read: Callable[[Any], list[int]], counts: Tensor, length: int) -> None:
        self._source = source
        self._read = read
        self._counts = counts
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        counts = self._counts.tolist()
        for repeat in range(max(counts)):
            for found in self._source:
                yield from (index for index in self._read(found) if counts[index] > repeat)


def _redistributed(sampler: data.DistributedSampler[Any], positions: Any, number: int) -> data.DistributedSampler[Any]:
    other: data.DistributedSampler[Any] = data.DistributedSampler(
        positions, sampler.num_replicas, sampler.rank, sampler.shuffle, sampler.seed, sampler.drop_last
    )
    other.set_epoch(sampler.epoch + number * _NEXT_PASS)
    return other


def _scaled(samples: int, kept: int, total: int) -> int:
    return kept if samples == total else max(1, round(samples * kept / total))


def _refuse(original: Any, needed_by: str) -> None:
    name = type(original).__name__
    if not isinstance(getattr(original, "batch_size", None), int):
        raise TypeError(
            f"{needed_by} needs the number of samples in a batch, but {name} has no batch_size. Give it an attribute "
            "batch_size: the number of indices in each list that it yields."
        )
    if not hasattr(original, "__len__"):
        raise TypeError(
            f"{needed_by} needs the number of batches in an epoch, but {name} has no __len__. Give it a __len__ that "
            "returns that number."
        )
    sampler = getattr(original, "sampler", None)
    known = type(sampler) is data.DistributedSampler
    if isinstance(sampler, data.DistributedSampler) and not known and sampler.num_replicas > 1:
        raise TypeError(
            f"{needed_by} cannot follow the samples of {type(sampler).__name__}, because it is unknown how it splits "
            "them between ranks, whose epochs could differ in length. Use shuffle=True or False, a DistributedSampler, "
            "or one process."
        )
