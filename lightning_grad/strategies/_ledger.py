"""Measurements of the strategies: bytes passed to collectives, time of compression, noise scale."""

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
_MOST_ENTRIES = 65_536  # size of the sample of gradient entries for the noise scale
_DECAY = 0.9  # of the averages, per log step: single estimates are very noisy


class ByteLedger:
    """Counts the bytes that this rank passes to collectives, and the bytes of the gradients themselves.

    Attributes:
        steps: Number of exchanges in the run.
        sent_bytes: Bytes sent in the run.
        dense_bytes: Bytes of the run's gradients in their own dtype.
        step_sent: Bytes sent in the last exchange.
        step_dense: Bytes of the gradients in the last exchange.
        record: Logged values, one row per log step.
    """

    def __init__(self) -> None:
        self.steps = self.sent_bytes = self.dense_bytes = 0
        self.step_sent = self.step_dense = 0
        self.record = RunRecord()

    def open(self, dense: int) -> None:
        """Start an exchange of gradients with this many bytes."""
        self.step_sent, self.step_dense = 0, dense

    def send(self, tensor: Tensor) -> None:
        """Count a tensor that is passed to a collective."""
        self.step_sent += tensor.numel() * tensor.element_size()

    def close(self) -> None:
        """End an exchange and add it to the totals; an exchange that failed is not counted."""
        self.steps += 1
        self.sent_bytes += self.step_sent
        self.dense_bytes += self.step_dense

    @property
    def step_ratio(self) -> float:
        """Bytes of the gradients divided by bytes sent, in the last exchange."""
        return self.step_dense / max(self.step_sent, 1)

    @property
    def ratio(self) -> float:
        """Bytes of the gradients divided by bytes sent, over the run."""
        return self.dense_bytes / max(self.sent_bytes, 1)

    def state_dict(self) -> dict[str, Any]:
        """Return the counts and the record."""
        return {**{name: getattr(self, name) for name in _COUNTS}, "record": self.record.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved ledger."""
        for name in _COUNTS:
            setattr(self, name, state[name])
        self.record.load_state_dict(state["record"])


class Stopwatch:
    """Measures time without pauses. Synchronizes with a GPU only while it is on.

    Args:
        device: Device whose work is timed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on = False
        self._begin = 0.0
        self.seconds = 0.0

    def start(self, on: bool) -> None:
        """Start at zero; with ``on=False`` nothing is measured and nothing waits for the device."""
        self._on, self.seconds = on, 0.0
        self._begin = self._now()

    def stop(self) -> None:
        """Add the time since the last start or pause."""
        self.seconds += self._now() - self._begin

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time of the block."""
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
    """Return running averages of noise and signal over log steps, (2,), in units of one rank's batch.

    Args:
        past: The averages so far, or ``None``.
        flat: Flat gradients of this rank.
        ranks: Number of ranks, at least 2.
        mean: Function that averages a tensor over ranks.
    """
    stride = max(1, sum(gradient.numel() for gradient in flat) // _MOST_ENTRIES)
    sample = torch.cat([gradient[::stride].float() for gradient in flat])
    averaged = mean(torch.cat([sample, sample.square().sum().view(1)]))
    terms = noise_scale_terms(averaged[-1], averaged[:-1].square().sum(), 1, ranks)
    return average_noise_terms(past, torch.stack(terms).double().cpu(), _DECAY)
