r"""The outer step of local SGD and DiLoCo: move shared weights along the mean of what the ranks moved."""

from collections.abc import Sequence

import torch
from torch import Tensor


def outer_step_(
    outer: Sequence[Tensor],
    moves: Sequence[Tensor],
    velocities: Sequence[Tensor] | None = None,
    lr: float = 1.0,
    momentum: float = 0.0,
) -> None:
    r"""Move the outer weights along the mean move of the ranks, in place.

    .. math::
        v \leftarrow \mu v + \bar\Delta, \qquad \theta \leftarrow \theta - \eta \, (\bar\Delta + \mu v)

    where :math:`\theta` are the outer weights, :math:`\bar\Delta = \frac 1 N \sum_r (\theta - \theta_r)` is the mean of
    what the ranks moved, seen as a gradient, :math:`v` the velocity, :math:`\eta` the learning rate and :math:`\mu` the
    Nesterov momentum. This is ``torch.optim.SGD(nesterov=True)`` with the gradient :math:`\bar\Delta`. With
    :math:`\eta = 1` and :math:`\mu = 0` the outer weights become the mean of the ranks' weights.

    Args:
        outer: Outer weights, changed in place.
        moves: Mean moves, shaped like the weights; may be changed.
        velocities: Velocities, shaped like the weights, changed in place; not needed without momentum.
        lr: Learning rate of the outer step.
        momentum: Nesterov momentum of the outer step.

    Example:
        >>> weight, velocity = torch.tensor([1.0]), torch.tensor([0.0])
        >>> outer_step_([weight], [torch.tensor([0.5])], [velocity], lr=0.7, momentum=0.9)
        >>> weight, velocity
        (tensor([0.3350]), tensor([0.5000]))

    References:
        - Douillard et al. (2023), DiLoCo: Distributed Low-Communication Training of Language Models, arXiv 2311.08105,
          algorithm 1.
    """
    if not outer:
        return
    steps = list(moves)
    if momentum:
        assert velocities is not None
        torch._foreach_mul_(list(velocities), momentum)
        torch._foreach_add_(list(velocities), steps)
        torch._foreach_add_(steps, list(velocities), alpha=momentum)
    torch._foreach_sub_(list(outer), steps, alpha=lr)
