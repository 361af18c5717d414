"""The averages of Adam, for optimizers that keep them of a part of the gradient."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def update_moments_(
    mean: Tensor, square: Tensor, gradient: Tensor, step: int, betas: Sequence[float], eps: float
) -> Tensor:
    r"""Update the moments of Adam in place, and return the denominator of its step.

    .. math::
        m \leftarrow \beta_1 m + (1 - \beta_1) g, \qquad v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \qquad
        d = \sqrt{\frac{v}{1 - \beta_2^t}} + \epsilon

    The step is :math:`m / ((1 - \beta_1^t) \, d)`. The operations and their order are those of ``torch.optim.AdamW``.

    Args:
        mean: m.
        square: v.
        gradient: g, of the same shape.
        step: t, the number of this step, from 1.
        betas: :math:`\beta_1` and :math:`\beta_2`.
        eps: :math:`\epsilon`.
    """
    mean.lerp_(gradient, 1 - betas[0])
    square.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    return (square.sqrt() / math.sqrt(1 - betas[1] ** step)).add_(eps)
