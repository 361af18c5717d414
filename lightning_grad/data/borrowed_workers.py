"""Reading other batches with the workers that a loader keeps from epoch to epoch, without a trace.

Workers that are spawned take seconds to start, and each imports the program again. Between two epochs those of
``DataLoader(persistent_workers=True)`` have nothing to do. Here they read what is wanted; their random streams, and those of
the data set that they hold, are put back afterwards, so that the next epoch is what it would have been.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, _utils, get_worker_info

from lightning_grad.data.random_streams import generators_kept, holds_generators, random_streams_kept

# Of torch's iterator, which has no public way to be asked for other batches. Without them nothing is borrowed.
_NEEDED = ("_index_sampler", "_index_queues", "_get_data", "_reset")
_worker: Any = _utils.worker
_Acknowledged: Any = getattr(_worker, "_ResumeIteration", None)


class BorrowedWorkers:
    """Batches of a loader's data set, read by its persistent workers.

    To be iterated over once, between two epochs: what is left of the last one is thrown away.

    Args:
        loader: The loader, which has been iterated over.
        batches: Indices of each batch.
        seed: Seed of the workers' random streams.
    """

    def __init__(self, loader: DataLoader[Any], batches: Sequence[list[int]], seed: int) -> None:
        self.dataset = loader.dataset
        self._loader = loader
        self._batches = batches
        generator = torch.Generator().manual_seed(seed)
        self._seed = int(torch.empty((), dtype=torch.int64).random_(generator=generator))  # as a loader draws it

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        live: Any = self._loader._iterator
        sampler = live._index_sampler
        try:
            self._tell(live, _Message(_begin, self._seed))
            live._index_sampler = self._batches
            live._reset(self._loader)
            yield from live
            self._tell(live, _Message(_end))
        except BaseException:
            self._loader._iterator = None  # their streams are not those of the training: new ones are started
            raise
        finally:
            live._index_sampler = sampler

    def _tell(self, live: Any, message: Any) -> None:
        """Send a message to every worker, and wait until all have read it."""
        for queue in live._index_queues:
            queue.put(message)
        waiting = len(live._index_queues)
        while waiting:
            answer, _ = live._get_data()  # or a batch that is left of the last epoch
            waiting -= isinstance(answer, _Acknowledged)


def can_borrow(loader: DataLoader[Any]) -> bool:
    """Return whether a loader has workers that wait for the next epoch, and that can be left as they were."""
    live = loader._iterator
    known = _Acknowledged is not None and all(hasattr(live, name) for name in _NEEDED)
    return live is not None and known and not holds_generators(loader.collate_fn)  # of which a worker has its own


class _Message:
    """Becomes, where a worker reads it, what a function returns there: that the worker has nothing to do but to answer."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


# In a worker.

_ASIDE = ExitStack()


def _begin(seed: int) -> Any:
    """Put the worker's random streams aside, and seed others."""
    worker: Any = get_worker_info()
    _ASIDE.enter_context(random_streams_kept())
    _ASIDE.enter_context(generators_kept(worker.dataset))
    random.seed(seed + worker.id)
    torch.manual_seed(seed + worker.id)
    np.random.seed(_worker._generate_state(seed, worker.id))
    return _Acknowledged()


def _end() -> Any:
    _ASIDE.close()
    return _Acknowledged()
