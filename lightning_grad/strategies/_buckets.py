"""Collects DDP's buckets until all gradients of a backward pass are there, and packs those that are sent dense.

Used by ``compressed_ddp.py``, which exchanges all gradients at once: collectives then run in the same order on all
ranks, one message carries all tensors, and the norm of the whole gradient is known before anything is sent. The dense
message ends with a flag: 0 if all gradients were finite, NaN otherwise.
"""

# No "from __future__ import annotations": torch compares the annotation of the hook's argument with the class itself.

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

_SMALL = 65_536  # entries up to which a copy costs less than a call


@dataclass(frozen=True)
class Gradient:
    """A gradient in DDP's bucket: this rank's before an exchange, the mean of all ranks after it.

    Args:
        name: Name of the parameter, without the prefix of ``torch.compile``.
        parameter: The parameter.
        values: Flat view of the bucket, in memory order.
        shaped: The same view in the shape of the parameter.
    """

    name: str
    parameter: Tensor
    values: Tensor
    shaped: Tensor


class BucketCollector:
    """Collects the gradients of a backward pass and exchanges them after the last bucket.

    Args:
        names: Names of the parameters by ``id``.
        exchange: Called with the gradients in bucket order; changes them in place.
    """

    def __init__(self, names: Mapping[int, str], exchange: Callable[[list[Gradient]], None]) -> None:
        self._names, self._exchange = names, exchange
        self.clear()

    def register(self, model: DistributedDataParallel) -> None:
        """Register this collector as the communication hook of a model."""
        model.register_comm_hook(self, _hook)

    def clear(self) -> None:
        """Drop the buckets of an interrupted backward pass."""
        self._gradients: list[Gradient] = []
        self._waiting: list[tuple[torch.futures.Future[Tensor], Tensor]] = []

    def collect(self, bucket: Any) -> torch.futures.Future[Tensor]:
        """Add a bucket and return a future for its result, which is set after the last bucket."""
        buffer = bucket.buffer()
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            start = gradient.storage_offset() - buffer.storage_offset()
            values = buffer[start : start + gradient.numel()]
            self._gradients.append(Gradient(self._names[id(parameter)], parameter, values, gradient))
        devices = [buffer.device] if buffer.device.type == "cuda" else None
        future: torch.futures.Future[Tensor] = torch.futures.Future(devices=devices)
        self._waiting.append((future, buffer))
        if bucket.is_last():
            gradients, waiting = self._gradients, self._waiting
            self.clear()
            self._exchange(gradients)
            for result, full in waiting:
                result.set_result(full)
        return future


def _hook(collector: BucketCollector, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]  # one of C++
    return collector.collect(bucket)


def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Return whether all entries are finite, as a 0-dimensional bool tensor."""
    # Sums overflow, and maximum norms take 20 times as long on a CPU.
    extremes = [extreme for tensor in _small_ones_joined(tensors) for extreme in torch.aminmax(tensor)]
    return torch.stack(extremes).isfinite().all()


def _small_ones_joined(tensors: Sequence[Tensor]) -> list[Tensor]:
    small = [tensor for tensor in tensors if tensor.numel() <= _SMALL]
    joined = [torch.cat(small)] if any(tensor.numel() for tensor in small) else []
    return [tensor for tensor in tensors if tensor.numel() > _SMALL] + joined


def concatenated(flat: Sequence[Tensor], last: Tensor) -> Tensor:
    """Return the flat tensors as one tensor with ``last`` at its end."""
    kind = flat[0].dtype if flat else torch.float32
    return torch.cat([*flat, last.to(kind).view(1)])


def write_dense(gradients: Sequence[Gradient], flat: Tensor) -> None:
    """Write the output of :func:`concatenated` back into the gradients, adding its last entry (0 or NaN) to all values."""
    if gradients:
        values = [gradient.values for gradient in gradients]
        parts = torch.split(flat[:-1] + flat[-1], [part.numel() for part in values])
        torch._foreach_copy_(values, list(parts))
