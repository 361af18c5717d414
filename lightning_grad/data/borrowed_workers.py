"""Read extra batches with a loader's persistent workers, without changing the following epochs.

Spawned workers take seconds to start, because each imports the program again. Between two epochs the workers of
``DataLoader(persistent_workers=True)`` are idle and can read other batches. Their random states, and those of their
copy of the data set, are restored afterwards, so the next epoch is unaffected.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, _utils, get_worker_info

from lightning_grad.data.random_streams import generators_kept, holds_generators, random_streams_kept

# Private attributes of torch's iterator, which has no public way to request other batches. If one is missing, no
# workers are borrowed.
_NEEDED = ("_index_sampler", "_index_queues", "_get_data", "_reset")
_worker: Any = _utils.worker
_Acknowledged: Any = getattr(_worker, "_ResumeIteration", None)


class BorrowedWorkers:
    """Batches of a loader's data set, read by its persistent workers.

    Iterate once, between two epochs: unread batches of the last epoch are discarded.

    Args:
        loader: The loader; it must have been iterated over before.
        batches: Indices of each batch.
        seed: Seed of the workers' random streams.
    """

    def __init__(self, loader: DataLoader[Any], batches: Sequence[list[int]], seed: int) -> None:
        self.dataset = loader.dataset
        self._loader = loader
        self._batches = batches
        generator = torch.Generator().manual_seed(seed)
        self._seed = int(torch.empty((), dtype=torch.int64).random_(generator=generator))  # drawn as a DataLoader does

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
            # The workers' random states are not those of training. Drop the iterator: the next epoch starts new
            # workers.
            self._loader._iterator = None
            raise
        finally:
            live._index_sampler = sampler

    def _tell(self, live: Any, message: Any) -> None:
        """Send a message to every worker, and wait until all have acknowledged it."""
        for queue in live._index_queues:
            queue.put(message)
        waiting = len(live._index_queues)
        while waiting:
            answer, _ = live._get_data()  # may also be an unread batch of the last epoch
            waiting -= isinstance(answer, _Acknowledged)


def can_borrow(loader: DataLoader[Any]) -> bool:
    """Return True if a loader has idle persistent workers whose state can be restored."""
    live = loader._iterator
    known = _Acknowledged is not None and all(hasattr(live, name) for name in _NEEDED)
    # Each worker has its own copy of collate_fn, whose generators cannot be restored.
    return live is not None and known and not holds_generators(loader.collate_fn)


class _Message:
    """Calls a function in the worker that unpickles it; the worker gets the result, an acknowledgement to send back."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


# The following runs in a worker.

_ASIDE = ExitStack()


def _begin(seed: int) -> Any:
    """Save the worker's random states, and seed its generators."""
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
