"""Weights for the samples of a batch, computed from their losses at each step.

The rules come from "Dynamic Loss-Based Sample Reweighting" (Sow et al., 2025, arXiv 2502.06733) and of its released
code, github.com/sowmaster/Sample-Level-Loss-Reweighting-ICLR-2025.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_grad.functional.choices import check_choice

RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "linupper": lambda h: (h + 1.0).clamp(max=1.0),
    "quadratic": lambda h: 1.0 - h.square(),
    "extremes": torch.abs,
}


def loss_weights(losses: Tensor, rule: str = "linupper", temperature: float = 1.0) -> Tensor:
    r"""Return weights for the samples of a batch, computed from their losses.

    .. math::
        h_i = 2 \frac{\ell_i - \ell_\min}{\ell_\max - \ell_\min} - 1, \qquad
        w = \operatorname{softmax}(f(h) / r), \qquad
        f(h) = \begin{cases}
            \min(h + 1, 1) & \text{linupper} \\ 1 - h^2 & \text{quadratic} \\ |h| & \text{extremes}
        \end{cases}

    "linupper" gives low-loss samples less weight, "quadratic" those at both ends, "extremes" those in the middle. The
    weighted loss is :math:`\sum_i w_i \ell_i`. Under data parallelism, pass the losses of the global batch, and
    multiply each rank's part of the sum by the number of ranks, because gradients are averaged over ranks.

    Formulas, rescaling with :math:`\delta = 1` and defaults match the released code (where "quadratic" is also
    called "mid"). A non-finite loss gets weight 0 and does not enter minimum and maximum; in the released code it makes
    all weights nan. Its product with 0 is still nan, so mask the loss as well. Equal losses get equal weights.

    Args:
        losses: :math:`\ell`, (B,): the loss of each sample of the batch.
        rule: f, ``"linupper"``, ``"quadratic"`` or ``"extremes"``.
        temperature: r, above 0; infinity gives equal weights.

    Returns:
        Tensor: w, (B,), at least float32, on the device of the losses, detached, computed without a host sync. The sum
        is 1, or 0 if no loss is finite.

    Raises:
        ValueError: If the rule is unknown, temperature is not above 0, or losses is not a vector.

    Example:
        >>> loss_weights(torch.tensor([0.0, 1.0, 2.0]))
        tensor([0.1554, 0.4223, 0.4223])

    References:
        Sow et al., "Dynamic Loss-Based Sample Reweighting for Improved Large Language Model Pretraining", 2025,
        arXiv 2502.06733.
    """
    check_choice(rule, RULES, "rule")
    if not temperature > 0.0:
        raise ValueError(f"temperature must be above 0 (infinity gives equal weights); got {temperature}.")
    if losses.ndim != 1:
        raise ValueError(f"losses must have one entry for each sample, (B,); got shape {tuple(losses.shape)}.")
    losses = losses.detach()
    losses = losses if losses.dtype == torch.float64 else losses.float()
    if not len(losses):
        return losses
    valid = losses.isfinite()
    invalid = ~valid
    low = losses.masked_fill(invalid, torch.inf).amin()
    high = losses.masked_fill(invalid, -torch.inf).amax()
    # Halved first: the difference of two large numbers of opposite sign can overflow.
    spread = high / 2 - low / 2
    h = torch.where(valid & (spread > 0), (losses / 2 - low / 2) / spread * 2.0 - 1.0, 0.0)
    weights = (RULES[rule](h) / temperature).masked_fill(invalid, -torch.inf).softmax(0)
    return torch.where(valid, weights, 0.0)


def annealed_temperature(
    progress: float, start: float = 10.0, end: float = 1.0, warmup_fraction: float = 0.05
) -> float:
    r"""Return the temperature at a point of the run: infinite in the warm-up, then decreasing.

    .. math::
        r(t) = \begin{cases} \infty & t < t_0 \\ r_0 (r_1 / r_0)^{(t - t_0) / (1 - t_0)} & \text{else} \end{cases}

    Early losses carry little information, so the warm-up weights all samples equally. The released code does not weight
    the first 1000 of 20 000 steps, and then sets r = 1 (here ``start=1.0, end=1.0``). Its readme recommends a
    decreasing schedule without specifying its form; the geometric form is our choice.

    Args:
        progress: t, completed fraction of the run, 0 to 1.
        start: :math:`r_0`, temperature after the warm-up.
        end: :math:`r_1`, temperature at the end.
        warmup_fraction: :math:`t_0`, initial fraction of the run with equal weights.

    Returns:
        float: r, for :func:`loss_weights`.

    Raises:
        ValueError: If a temperature is not above 0 or not finite, or warmup_fraction is outside [0, 1].

    Example:
        >>> [round(annealed_temperature(t, start=100.0, end=1.0, warmup_fraction=0.2), 6) for t in (0.0, 0.2, 0.6, 1.0)]
        [inf, 100.0, 10.0, 1.0]

    References:
        Sow et al., 2025, arXiv 2502.06733, and its released code (``burnout_steps``, ``kl_reg``).
    """
    for name, value in (("start", start), ("end", end)):
        if not 0.0 < value < math.inf:
            raise ValueError(f"{name} must be finite and above 0; got {value}.")
    if not 0.0 <= warmup_fraction <= 1.0:
        raise ValueError(f"warmup_fraction must be between 0 and 1, a fraction of the run; got {warmup_fraction}.")
    if progress < warmup_fraction:
        return math.inf
    done = min((progress - warmup_fraction) / (1.0 - warmup_fraction), 1.0) if warmup_fraction < 1.0 else 1.0
    return start * math.exp(done * math.log(end / start))
