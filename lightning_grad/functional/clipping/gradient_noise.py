"""Add annealed Gaussian noise to gradients."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_grad.functional.gradients.shards import shard_of
from lightning_grad.functional.gradients.tensor_lists import is_sharded

_PIECE = 1 << 16


def noise_deviation(step: int, eta: float = 0.01, decay: float = 0.55) -> float:
    r"""Return the standard deviation of annealed gradient noise.

    .. math::
        \sigma_t = \sqrt{\frac{\eta}{(1 + t)^\gamma}}

    Args:
        step: t, the number of optimizer steps before this one.
        eta: :math:`\eta`, variance at the first step; the paper tries 0.01, 0.3 and 1.
        decay: :math:`\gamma`, exponent of the decay of the variance.

    Example:
        >>> noise_deviation(0, eta=0.01)
        0.1

    References:
        Neelakantan et al., "Adding Gradient Noise Improves Learning for Very Deep Networks", 2015, arXiv 1511.06807,
        equation 1.
    """
    return math.sqrt(eta / (1.0 + step) ** decay)


@torch.no_grad()
def add_gradient_noise_(gradients: Sequence[Tensor], deviation: float, seed: int) -> None:
    r"""Add Gaussian noise to gradients, identical on every rank for the same seed.

    .. math::
        g \leftarrow g + \mathcal N(0, \sigma^2)

    The global random state of torch is not used. A rank that holds a shard draws the noise of the whole gradient.

    Args:
        gradients: Tensors of any shape; changed in place.
        deviation: :math:`\sigma`, the standard deviation of the noise.
        seed: Seed of this draw; use a different one for each step.

    Example:
        >>> a, b = torch.zeros(3), torch.zeros(3)
        >>> add_gradient_noise_([a], 0.1, seed=1), add_gradient_noise_([b], 0.1, seed=1)
        (None, None)
        >>> torch.equal(a, b), bool(a.abs().sum() > 0)
        (True, True)
    """
    generators: dict[torch.device, torch.Generator] = {}
    for gradient in gradients:
        device = gradient.device
        if device not in generators:
            generators[device] = torch.Generator(device).manual_seed(seed + len(generators))
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        if gradient.is_cpu and gradient.numel() >= 2 * _PIECE and gradient.is_contiguous() and not is_sharded(gradient):
            _add_in_pieces_(gradient.view(-1), deviation, generators[device], dtype)
            continue
        noise = torch.randn(gradient.shape, generator=generators[device], device=device, dtype=dtype)
        gradient.add_(shard_of(noise, gradient), alpha=deviation)


def _add_in_pieces_(gradient: Tensor, deviation: float, generator: torch.Generator, dtype: torch.dtype) -> None:
    """Add the same noise as in one piece, but from a buffer that stays in the processor's cache.

    torch draws 16 numbers at a time, and draws the last 16 again if their number is no multiple of 16. All pieces but the
    last are therefore multiples, and the last is not small.
    """
    last = gradient.numel() % _PIECE + _PIECE
    buffer = torch.empty(2 * _PIECE, dtype=dtype, device="cpu")
    for piece in torch.split(gradient, [*[_PIECE] * (gradient.numel() // _PIECE - 1), last]):
        piece.add_(buffer[: len(piece)].normal_(generator=generator), alpha=deviation)
