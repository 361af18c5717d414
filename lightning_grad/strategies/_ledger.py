"""What the strategies measure of themselves: bytes handed to collectives, time spent between them, noise scale."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_grad.core.record import RunRecord
from lightning_grad.functional import noise_scale_terms
from lightning_grad.functional.diagnostics.gradient_statistics import average_noise_terms

_COUNTS = ("steps", "sent_bytes", "dense_bytes", "step_sent", "step_dense")
_MOST_ENTRIES = 65_536  # of a sample of the gradients, for their noise
_DECAY = 0.9  # of the averages, a log step; each estimate alone is very noisy


class ByteLedger:
    """Counts the bytes that this rank hands to collectives, and those of the gradients that they stand for.

    Attributes:
        steps: Exchanges of the run.
        sent_bytes: Of the run.
        dense_bytes: Of the gradients of the run, in their own type.
        step_sent: Bytes of the last exchange.
        step_dense: Bytes of its gradients.
        record: What was logged, one row a log step.
    """

    def __init__(self) -> None:
        self.steps = self.sent_bytes = self.dense_bytes = 0
        self.step_sent = self.step_dense = 0
        self.record = RunRecord()

    def open(self, dense: int) -> None:
        """Begin an exchange of gradients of so many bytes."""
        self.step_sent, self.step_dense = 0, dense

    def send(self, tensor: Tensor) -> None:
        """Take in a tensor that goes to a collective."""
        self.step_sent += tensor.numel() * tensor.element_size()

    def close(self) -> None:
        """End an exchange: only one that was made counts."""
        self.steps += 1
        self.sent_bytes += self.step_sent
        self.dense_bytes += self.step_dense

    @property
    def step_ratio(self) -> float:
        """How many times smaller the last exchange was than its gradients."""
        return self.step_dense / max(self.step_sent, 1)

    @property
    def ratio(self) -> float:
        """How many times less was sent in the run than its gradients have."""
        return self.dense_bytes / max(self.sent_bytes, 1)

    def state_dict(self) -> dict[str, Any]:
        """Return everything."""
        return {**{name: getattr(self, name) for name in _COUNTS}, "record": self.record.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with a saved ledger."""
        for name in _COUNTS:
            setattr(self, name, state[name])
        self.record.load_state_dict(state["record"])


class Stopwatch:
    """Adds up the time in which it runs; a GPU is waited for only while it is on.

    Args:
        device: Whose work is timed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on = False
        self._begin = 0.0
        self.seconds = 0.0

    def start(self, on: bool) -> None:
        """Begin at zero; ``on=False`` measures nothing and costs nothing."""
        self._on, self.seconds = on, 0.0
        self._begin = self._now()

    def stop(self) -> None:
        """End."""
        self.seconds += self._now() - self._begin

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what happens meanwhile."""
        self.stop()
        try:
            yield
        finally:
            self._begin = self._now()

    def _now(self) -> float:
        if self._on and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def measure_noise(past: Tensor | None, flat: Sequence[Tensor], ranks: int, mean: Callable[[Tensor], Tensor]) -> Tensor:
    """Return averages of noise and signal over log steps, (2,), in units of one rank's batch.

    Args:
        past: Averages so far; ``None`` at first.
        flat: Gradients of this rank, flat.
        ranks: How many ranks there are, at least 2.
        mean: Averages a tensor over ranks.
    """
    stride = max(1, sum(gradient.numel() for gradient in flat) // _MOST_ENTRIES)
    sample = torch.cat([gradient[::stride].float() for gradient in flat])
    averaged = mean(torch.cat([sample, sample.square().sum().view(1)]))
    terms = noise_scale_terms(averaged[-1], averaged[:-1].square().sum(), 1, ranks)
    return average_noise_terms(past, torch.stack(terms).double().cpu(), _DECAY)
