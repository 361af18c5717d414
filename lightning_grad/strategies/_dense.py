"""The dense message of a step: what is not compressed, and a number that says whether all gradients were finite."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lightning_grad.strategies._buckets import Gradient


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


def write_past_ddp(gradients: Iterable[Gradient]) -> None:
    """Write gradients from their buckets to their parameters, where DDP does not do so."""
    for gradient in gradients:
        if gradient.parameter.grad is not None:
            gradient.parameter.grad.copy_(gradient.shaped)
