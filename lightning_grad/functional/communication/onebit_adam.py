r"""1-bit Adam: Adam whose variance is frozen, so its momentum can be exchanged as signs."""

from collections.abc import Sequence

import torch
from torch import Tensor


def gradient_of_momentum(momentum: Tensor, before: Tensor, beta1: float) -> Tensor:
    r"""Return the gradient with which Adam moves its momentum from one value to another.

    .. math::
        g = \frac{m_t - \beta_1 m_{t-1}}{1 - \beta_1}

    Args:
        momentum: :math:`m_t`, any shape.
        before: :math:`m_{t-1}`, same shape.
        beta1: Decay of the momentum, below 1.

    Returns:
        Tensor: A new tensor of the shape and dtype of ``momentum``.

    Example:
        >>> gradient_of_momentum(torch.tensor([0.2]), torch.tensor([0.0]), beta1=0.5)
        tensor([0.4000])
    """
    return momentum.sub(before, alpha=beta1).div_(1.0 - beta1)


def frozen_adam_(
    parameter: Tensor,
    gradient: Tensor,
    momentum: Tensor,
    variances: Sequence[Tensor],
    step: Tensor | float,
    lr: Tensor | float,
    betas: tuple[float, float],
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    floor: float = 0.0,
) -> None:
    r"""Make a step of Adam or AdamW whose variance stays what it is, in place.

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
        v_t = v_{t-1} \frac{1 - \beta_2^t}{1 - \beta_2^{t-1}}

    .. math::
        \hat v = \frac{\max(v_t, f \, \overline{v_t})}{1 - \beta_2^t}, \qquad
        \theta \leftarrow \theta - \eta \, \frac{m_t / (1 - \beta_1^t)}{\sqrt{\hat v} + \epsilon}

    The bias-corrected variance :math:`v_t / (1 - \beta_2^t)` never changes, and :math:`v_t` is at any time a state from which
    Adam itself can go on. The floor :math:`f \, \overline{v_t}`, a share of the mean variance of the tensor, limits the steps
    of entries that had almost no gradient while the variance was estimated. Without it a momentum of one magnitude for all
    entries, as signs encode it, moves them by :math:`\eta |m| / \epsilon`.

    Args:
        parameter: :math:`\theta`, changed in place.
        gradient: :math:`g_t`, shaped like ``parameter``.
        momentum: :math:`m_{t-1}` (``exp_avg``), changed in place.
        variances: :math:`v_{t-1}` (``exp_avg_sq``), changed in place; the last is used. AMSGrad has a second.
        step: :math:`t`, at least 2; a 0-dimensional tensor causes no host sync.
        lr: Learning rate :math:`\eta`.
        betas: :math:`(\beta_1, \beta_2)`.
        eps: :math:`\epsilon`.
        weight_decay: Adam adds ``weight_decay`` times the parameter to the gradient.
        decoupled: Shrink the parameter instead, as AdamW does.
        floor: :math:`f`, at least 0.

    Example:
        >>> weight, m, v = torch.tensor([1.0]), torch.tensor([0.1]), torch.tensor([0.001])
        >>> frozen_adam_(weight, torch.tensor([9.0]), m, [v], step=2, lr=0.1, betas=(0.9, 0.999))
        >>> round(v.item() / (1 - 0.999**2), 4)
        1.0

    References:
        - Tang et al. (2021), 1-bit Adam: Communication Efficient Large-Scale Training with Adam's Convergence Speed, arXiv
          2102.02888, algorithm 1. The paper corrects no bias and has no floor.
    """
    beta1, beta2 = betas
    if weight_decay and decoupled:
        parameter.mul_(1 - lr * weight_decay)
    elif weight_decay:
        gradient = gradient.add(parameter, alpha=weight_decay)
    momentum.lerp_(gradient.to(momentum.dtype), 1 - beta1)
    bias1, bias2 = 1 - beta1**step, 1 - beta2**step
    growth = bias2 / (1 - beta2 ** (step - 1))
    for variance in variances:
        variance.mul_(growth)
    used = variances[-1]
    denominator = torch.maximum(used, used.mean() * floor).sqrt_().div_(bias2**0.5).add_(eps)
    parameter.sub_((momentum / denominator).mul_(lr / bias1))
