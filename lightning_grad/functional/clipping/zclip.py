"""ZClip: a threshold from the z-score of the gradient norm. Its state works like AutoClip's."""

import torch
from torch import Tensor

from lightning_grad.functional.clipping.norms import statistic


def zclip_state(device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Return the initial state of ZClip.

    Args:
        device: Device of the gradients.

    Returns:
        dict: Scalars ``count`` (finite norms seen), ``mean`` and ``variance``.
    """
    return {key: statistic(0.0, torch.device(device)) for key in ("count", "mean", "variance")}


@torch.no_grad()
def zclip_threshold_(
    norm: Tensor,
    state: dict[str, Tensor],
    z_threshold: float = 2.5,
    alpha: float = 0.97,
    max_norm: float | None = 1.0,
    warmup_steps: int = 25,
    eps: float = 1e-6,
) -> Tensor:
    r"""Add a norm to the state and return the largest norm allowed, by its z-score among previous norms.

    .. math::
        z_t = \frac{n_t - \mu}{\sigma + \epsilon}, \qquad
        \tau_t = \begin{cases} \mu + z^\ast \sigma \cdot z^\ast / z_t & z_t > z^\ast \\ n_t & \text{else} \end{cases}

    Then :math:`\mu \leftarrow \alpha \mu + (1 - \alpha) \tau_t` and, with the new mean,
    :math:`\sigma^2 \leftarrow \alpha \sigma^2 + (1 - \alpha)(\tau_t - \mu)^2`. The norms of the warm-up only initialize
    mean and variance. The result is :math:`\min(\tau_t, c)`.

    This is the published algorithm with one change: non-finite norms are ignored. In the published code, one inf during
    the warm-up or one nan after it makes the statistics nan permanently.

    Args:
        norm: :math:`n_t`, a scalar.
        state: From :func:`zclip_state`; changed in place.
        z_threshold: :math:`z^\ast`; a norm with a larger z-score is a spike.
        alpha: :math:`\alpha`, smoothing factor of mean and variance.
        max_norm: c, upper bound for every step, including the warm-up; ``None`` sets none.
        warmup_steps: Number of norms that initialize mean and variance.
        eps: :math:`\epsilon`, added to the standard deviation.

    Returns:
        Tensor: The largest norm allowed for this step, a scalar; equal to ``norm`` if nothing needs clipping.

    Example:
        >>> state = zclip_state()
        >>> for n in (1.0, 1.2, 0.8, 1.0):
        ...     _ = zclip_threshold_(torch.tensor(n), state, max_norm=None, warmup_steps=4)
        >>> zclip_threshold_(torch.tensor(9.0), state, max_norm=None, warmup_steps=4)
        tensor(1.0156, dtype=torch.float64)

    References:
        Kumar et al., "ZClip: Adaptive Spike Mitigation for LLM Pre-Training", 2025, arXiv 2504.02507, algorithm 1.
    """
    count, mean, variance = state["count"], state["mean"], state["variance"]
    finite, warm = norm.isfinite(), count < warmup_steps
    n = torch.where(finite, norm.to(mean.dtype), mean)
    deviation = variance.sqrt()
    z = (n - mean) / (deviation + eps)
    spike = (z > z_threshold) & ~warm
    threshold = torch.where(spike, mean + z_threshold * deviation / (z / z_threshold).clamp(min=1.0), n)
    seen = count + 1
    # Welford's running mean and variance in the warm-up, exponential averages after it.
    new_mean = torch.where(warm, mean + (n - mean) / seen, alpha * mean + (1 - alpha) * threshold)
    warm_variance = (variance * count + (n - mean) * (n - new_mean)) / seen
    new_variance = torch.where(warm, warm_variance, alpha * variance + (1 - alpha) * (threshold - new_mean).square())
    for old, new in ((count, seen), (variance, new_variance), (mean, new_mean)):
        old.copy_(torch.where(finite, new, old))
    return threshold if max_norm is None else threshold.clamp(max=max_norm)
