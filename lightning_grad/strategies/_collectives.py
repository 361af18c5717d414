"""The collectives of an exchange. Counts their bytes, excludes waiting time, and names lost ranks.

Ctrl-C is deferred to the end of an exchange, so all ranks complete it or none does.
"""

import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_grad.strategies._ledger import ByteLedger, Stopwatch
from lightning_grad.strategies._lost_ranks import explain_loss

_SIGNS = r"gloo/|nccl|processgroup|pair closure"


class Collectives:
    """Communicates with all ranks.

    Args:
        display_name: Name of the strategy in errors.
        rank: This rank.
        ranks: Number of ranks.
        ledger: Counts the bytes.
        watch: Paused while ranks wait for each other.
        exchanged: What is exchanged, in the plural, and the unit that is counted, for errors.
    """

    def __init__(
        self, display_name: str, rank: int, ranks: int, ledger: ByteLedger, watch: Stopwatch, exchanged: str
    ) -> None:
        self.rank, self.ranks, self._exchanged = rank, ranks, exchanged
        self._display_name, self._ledger, self._watch = display_name, ledger, watch

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all ranks, all of the same shape, in rank order: (ranks, ...)."""
        return self.begin_gather(tensor)()

    def begin_gather(self, tensor: Tensor, counted: bool = True) -> Callable[[], Tensor]:
        """Start to gather the tensors of all ranks, and return a function that waits and returns them: (ranks, ...)."""
        everyone = tensor.new_empty(self.ranks, *tensor.shape)
        return self._begin(tensor, everyone, lambda: dist.all_gather(list(everyone), tensor, async_op=True), counted)

    def swap(self, rows: Tensor) -> Tensor:
        """Send row i to rank i, and return the rows that all ranks sent here, in rank order: (ranks, ...).

        The own row stays here and is not counted.
        """
        arrived = torch.empty_like(rows)
        sent = rows[1:]  # as many as go to the others
        return self._begin(sent, arrived, lambda: dist.all_to_all_single(arrived, rows, async_op=True), True)()

    def maximum_(self, tensor: Tensor, counted: bool = True) -> Tensor:
        """Replace a tensor with its maximum over ranks and return it; ``counted=False`` does not count its bytes."""
        if counted:
            self._ledger.send(tensor)
        with self._connection():
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def mean_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor with its mean over ranks and return it."""
        self.begin_mean_(tensor)()
        return tensor

    def begin_mean_(self, tensor: Tensor, counted: bool = True) -> Callable[[], Tensor]:
        """Start to average a tensor over ranks in place, and return a function that waits and returns it."""
        tensor.mul_(1.0 / self.ranks)  # DDP multiplies too: dividing would round differently
        return self._begin(tensor, tensor, lambda: dist.all_reduce(tensor, async_op=True), counted)

    def begin_copy_(self, tensor: Tensor, counted: bool = True) -> Callable[[], Tensor]:
        """Start to copy rank 0's tensor to all ranks in place, and return a function that waits and returns it."""
        return self._begin(tensor, tensor, lambda: dist.broadcast(tensor, 0, async_op=True), counted)

    def _begin(self, sent: Tensor, result: Tensor, start: Callable[[], Any], counted: bool) -> Callable[[], Tensor]:
        if counted:
            self._ledger.send(sent)
        with self._connection():
            work = start()

        def finish() -> Tensor:
            with self._connection():
                work.wait()
            return result

        return finish

    @contextmanager
    def _connection(self) -> Iterator[None]:
        try:
            with self._watch.paused():
                yield
        except RuntimeError as error:
            step = f"could not exchange the {self._exchanged} {self._ledger.steps + 1}, because"
            words = f"{self._display_name}: rank {self.rank} {step} {explain_loss()}"
            raise RuntimeError(f"{words} ({error})") from error


def explain_lost_rank(error: BaseException, display_name: str) -> None:
    """Add an explanation to an error of torch.distributed that was raised outside of an exchange.

    Args:
        error: Its message is extended if it reports a lost connection.
        display_name: Name of the strategy.
    """
    text = str(error)
    if isinstance(error, RuntimeError) and f"{display_name}: " not in text and re.search(_SIGNS, text, re.IGNORECASE):
        error.args = (f"{text}\n{display_name}: {explain_loss()}", *error.args[1:])


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Defer SIGINT to the end of the block.

    Has an effect only in the main thread, the only one that Python interrupts.
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
