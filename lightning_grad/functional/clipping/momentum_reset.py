"""Reset the moments of an optimizer, and warm the learning rate up afterwards."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lightning_grad.functional.gradients.tensor_lists import shards

_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


@torch.no_grad()
def reset_moments_(states: Sequence[Mapping[str, Any]]) -> None:
    r"""Set the running moments of an Adam-like optimizer to zero, including AMSGrad's maxima.

    The step count is kept, so the bias correction does not restart. The first update after a reset can therefore be
    :math:`(1 - \beta_1) / \sqrt{1 - \beta_2}` learning rates large (3.2 with Adam's defaults). :func:`reset_warmup`
    compensates for that.

    Args:
        states: ``optimizer.state[parameter]`` of each parameter; moments are set to zero in place.

    Example:
        >>> state = {"step": torch.tensor(3.0), "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}
        >>> reset_moments_([state])
        >>> state["exp_avg"], state["exp_avg_sq"], state["step"]
        (tensor([0., 0.]), tensor([0., 0.]), tensor(3.))
    """
    moments = [state[key] for state in states for key in _MOMENTS if key in state]
    if moments:
        torch._foreach_zero_(shards(moments))


def reset_warmup(steps: int, warmup_steps: int = 150) -> float:
    r"""Return the learning rate factor of the warm-up after a reset of the moments.

    .. math::
        s_k = 1 - 0.99 \cdot \frac{1 + \cos(\pi k / (T + 1))}{2} \text{ for } k < T, \quad 1 \text{ from } T \text{ on}

    Args:
        steps: k, optimizer steps since the reset; 0 is the first step with zero moments.
        warmup_steps: T, length of the warm-up in optimizer steps.

    Example:
        >>> round(reset_warmup(0), 4), reset_warmup(150)
        (0.01, 1.0)

    References:
        Huang et al., 2025, arXiv 2501.06842, and the ``CosineDecay`` of its released code.
    """
    if steps >= warmup_steps:
        return 1.0
    return 1.0 - 0.99 * (1.0 + math.cos(math.pi * steps / (warmup_steps + 1))) / 2.0
