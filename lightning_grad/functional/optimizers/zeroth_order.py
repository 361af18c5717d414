"""Steps without gradients: random directions that are drawn again from a seed instead of stored (MeZO)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_grad.functional.gradients.tensor_lists import shards


@torch.no_grad()
def move_along_(weights: Sequence[Tensor], lengths: Sequence[float | Tensor], seed: int) -> None:
    r"""Move weights along a random direction, in place.

    .. math::
        w_i \leftarrow w_i + s_i z_i, \qquad z_i \sim \mathcal N(0, I)

    The direction depends only on the seed, the shapes and types of the weights and the kind of device, so it needs no
    memory and is the same on every rank.

    Args:
        weights: Tensors of any shape and floating-point type; changed in place.
        lengths: :math:`s_i` of each weight: numbers, or scalar tensors on the device of the weight.
        seed: Seed of the direction.

    Example:
        >>> w = torch.zeros(2)
        >>> move_along_([w], [1.0], seed=0)
        >>> w
        tensor([ 1.5410, -0.2934])
        >>> move_along_([w], [-1.0], seed=0)
        >>> w
        tensor([0., 0.])

    References:
        Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", NeurIPS 2023, arXiv 2305.17333,
        algorithm 1.
    """
    generators: dict[torch.device, torch.Generator] = {}
    for weight, length in zip(shards(weights), lengths, strict=True):
        if weight.device not in generators:
            generators[weight.device] = torch.Generator(weight.device).manual_seed(seed)
        _add_direction_(weight, length, generators[weight.device])


def _add_direction_(weight: Tensor, length: float | Tensor, generator: torch.Generator) -> None:
    # A function, so the direction of one weight is gone before that of the next is drawn.
    direction = torch.randn(weight.shape, dtype=weight.dtype, device=weight.device, generator=generator)
    weight.add_(direction.mul_(length))
