"""The collectives of an exchange: their bytes are counted, their waiting is not timed, their failures are explained.

Ctrl-C waits for the end of an exchange: it is made on all ranks or on none, and its memory is changed wholly or not at all.
"""

import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor

from lightning_grad.strategies._ledger import ByteLedger, Stopwatch

_LOST = (
    "another rank has stopped or cannot be reached; see its own error. Start the run again from its last checkpoint."
)
_SIGNS = r"gloo/|nccl|processgroup"


class Collectives:
    """Talks to all ranks.

    Args:
        display_name: Who talks, for errors.
        rank: This rank.
        ranks: How many there are.
        ledger: Counts bytes.
        watch: Stands still while ranks wait for each other.
    """

    def __init__(self, display_name: str, rank: int, ranks: int, ledger: ByteLedger, watch: Stopwatch) -> None:
        self.rank, self.ranks = rank, ranks
        self._display_name, self._ledger, self._watch = display_name, ledger, watch

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all ranks, of equal shape, in the order of ranks: (ranks, ...)."""
        everyone = tensor.new_empty(self.ranks, *tensor.shape)
        self._ledger.send(tensor)
        with self._connection():
            dist.all_gather(list(everyone), tensor)
        return everyone

    def maximum_(self, tensor: Tensor, counted: bool = True) -> Tensor:
        """Return the maximum of a tensor over ranks, in place; ``counted=False`` leaves its bytes out."""
        if counted:
            self._ledger.send(tensor)
        with self._connection():
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def mean_(self, tensor: Tensor) -> Tensor:
        """Return the mean of a tensor over ranks, in place."""
        self.begin_mean_(tensor)()
        return tensor

    def begin_mean_(self, tensor: Tensor) -> Callable[[], None]:
        """Begin to average a tensor over ranks, in place; what is returned waits for the end."""
        tensor.mul_(1.0 / self.ranks)  # as DDP does, which multiplies
        self._ledger.send(tensor)
        with self._connection():
            work = dist.all_reduce(tensor, async_op=True)

        def finish() -> None:
            with self._connection():
                work.wait()

        return finish

    @contextmanager
    def _connection(self) -> Iterator[None]:
        try:
            with self._watch.paused():
                yield
        except RuntimeError as error:
            step = f"could not exchange the gradients of step {self._ledger.steps + 1}, because"
            raise RuntimeError(f"{self._display_name}: rank {self.rank} {step} {_LOST} ({error})") from error


def explain_lost_rank(error: BaseException, display_name: str) -> None:
    """Add to an error of torch.distributed, from whatever else DDP or Lightning send, what it means.

    Args:
        error: Its message is changed, if it tells of a lost connection.
        display_name: Whose run it is.
    """
    text = str(error)
    if isinstance(error, RuntimeError) and _LOST not in text and re.search(_SIGNS, text, re.IGNORECASE):
        error.args = (f"{text}\n{display_name}: {_LOST}", *error.args[1:])


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Let SIGINT wait for the end of a block, and then do what it would have done.

    Only in the main thread, the only one that Python interrupts.
    """
    if threading.current_thread() is not threading.main_thread() or not callable(signal.getsignal(signal.SIGINT)):
        yield
        return
    waiting: list[tuple[Any, ...]] = []
    handler: Any = signal.signal(signal.SIGINT, lambda *arguments: waiting.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if waiting:
            handler(*waiting[0])
