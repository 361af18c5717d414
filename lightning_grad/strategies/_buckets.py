"""DDP's buckets, collected until all gradients of a backward pass are there, and the message of those that go dense.

Used by ``compressed_ddp.py``, which exchanges all gradients at once: collectives then come in the same order on all ranks, one
message carries all tensors, and the norm of the whole gradient is known before anything is sent. The dense message ends with a
number that says whether all gradients were finite.
"""

# No "from __future__ import annotations": torch reads the annotation of the hook's argument, and wants the class itself.

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Gradient:
    """A gradient in DDP's bucket: of this rank before an exchange, the mean of all ranks after it.

    Args:
        name: Of its parameter, without ``torch.compile``'s prefix.
        parameter: Whose gradient it is.
        values: Its entries, flat, in the order of memory; a view of the bucket.
        shaped: The same view, in the shape of the parameter.
    """

    name: str
    parameter: Tensor
    values: Tensor
    shaped: Tensor


class BucketCollector:
    """Hands over all gradients of a backward pass once the last bucket is there.

    Args:
        names: Of the parameters, by identity.
        exchange: Called with the gradients, in the order of the buckets; changes them in place.
    """

    def __init__(self, names: Mapping[int, str], exchange: Callable[[list[Gradient]], None]) -> None:
        self._names, self._exchange = names, exchange
        self.clear()

    def register(self, model: DistributedDataParallel) -> None:
        """Become the communication hook of a model."""
        model.register_comm_hook(self, _hook)

    def clear(self) -> None:
        """Forget what a backward pass that was interrupted has left."""
        self._gradients: list[Gradient] = []
        self._waiting: list[tuple[torch.futures.Future[Tensor], Tensor]] = []

    def collect(self, bucket: Any) -> torch.futures.Future[Tensor]:
        """Take in a bucket, and return its result, which is there after the last one."""
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
    """Return whether all entries are finite, a 0-dimensional bool tensor."""
    # Neither sums, which overflow, nor maximum norms, which take the CPU twenty times as long.
    extremes = [extreme for tensor in tensors if tensor.numel() for extreme in torch.aminmax(tensor)]
    return torch.stack([extreme.isfinite() for extreme in extremes]).all()


def concatenated(flat: Sequence[Tensor], last: Tensor) -> Tensor:
    """Return flat tensors as one, with a number at its end."""
    kind = flat[0].dtype if flat else torch.float32
    return torch.cat([*flat, last.to(kind).view(1)])


def write_dense(gradients: Sequence[Gradient], flat: Tensor) -> None:
    """Write what :func:`concatenated` made back into gradients, plus the number at its end: 0, or NaN to be seen."""
    start = 0
    for gradient in gradients:
        end = start + gradient.values.numel()
        torch.add(flat[start:end], flat[-1], out=gradient.values)
        start = end
