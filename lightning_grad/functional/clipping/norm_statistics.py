"""Thresholds that follow the gradient norms seen so far: AutoClip and ZClip.

A state is a dict of scalars and vectors on the device, made by one function and changed in place by another, so that it
goes into a checkpoint as it is and nothing waits for the device. A norm that is not finite changes no state.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _number(value: float, device: torch.device) -> Tensor:
    # MPS has no float64.
    return torch.tensor(value, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)


def autoclip_state(window: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Return the state of AutoClip before the first step.

    Args:
        window: How many of the last norms are kept.
        device: Where the gradients are.

    Returns:
        dict: ``norms``, (window,) with infinity where there is none yet; ``count``, a scalar int64.
    """
    none = _number(math.inf, torch.device(device))
    return {"norms": none.repeat(window), "count": torch.zeros((), dtype=torch.int64, device=device)}


@torch.no_grad()
def autoclip_threshold_(norm: Tensor, state: dict[str, Tensor], percentile: float = 10.0) -> Tensor:
    r"""Take in a norm, and return the percentile of the norms seen.

    .. math::
        \tau_t = \operatorname{percentile}_p(\lVert g_1 \rVert, \ldots, \lVert g_t \rVert)

    Equal to ``np.percentile`` (linear interpolation) over the last ``window`` finite norms; the published code keeps all.

    Args:
        norm: :math:`\lVert g_t \rVert`, a scalar. One that is not finite is passed over.
        state: From :func:`autoclip_state`; changed in place.
        percentile: p, 0 to 100.

    Returns:
        Tensor: The threshold, a scalar; infinite as long as no norm was finite.

    Example:
        >>> state = autoclip_state(window=4)
        >>> [autoclip_threshold_(torch.tensor(n), state, 50.0).item() for n in (1.0, 3.0, torch.inf, 2.0)]
        [1.0, 2.0, 2.0, 2.0]

    References:
        Seetharaman et al., "AutoClip: Adaptive Gradient Clipping for Source Separation Networks", 2020, arXiv 2007.14469,
        algorithm 1.
    """
    norms, count = state["norms"], state["count"]
    finite = norm.isfinite()
    slot = (count % len(norms)).reshape(1)
    norms.index_copy_(0, slot, torch.where(finite, norm.to(norms.dtype), norms[slot]).reshape(1))
    count.add_(finite)
    share = percentile / 100.0
    # As many of the least as can be needed: known beforehand, so the host need not wait, and cheaper than a sort.
    needed = min(len(norms), math.floor(share * (len(norms) - 1)) + 2)
    least = norms.topk(needed, largest=False).values
    rank = (count.clamp(1, len(norms)) - 1).to(norms.dtype) * share
    below, above = least[torch.stack([rank.floor(), rank.ceil()]).long()].unbind()
    return torch.where(below == above, below, torch.lerp(below, above, rank.frac()))


def zclip_state(device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Return the state of ZClip before the first step.

    Args:
        device: Where the gradients are.

    Returns:
        dict: Scalars ``count`` (finite norms seen), ``mean`` and ``variance``.
    """
    return {key: _number(0.0, torch.device(device)) for key in ("count", "mean", "variance")}


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
    r"""Take in a norm, and return what it may be at most, by its z-score among those before.

    .. math::
        z_t = \frac{n_t - \mu}{\sigma + \epsilon}, \qquad
        \tau_t = \begin{cases} \mu + z^\ast \sigma \cdot z^\ast / z_t & z_t > z^\ast \\ n_t & \text{else} \end{cases}

    then :math:`\mu \leftarrow \alpha \mu + (1 - \alpha) \tau_t` and, with the new mean,
    :math:`\sigma^2 \leftarrow \alpha \sigma^2 + (1 - \alpha)(\tau_t - \mu)^2`. The first norms only give mean and variance
    their start. What is returned is :math:`\min(\tau_t, c)`.

    It is the published algorithm but for one thing: a norm that is not finite changes nothing. There, one inf in the
    warm-up or one nan after it makes the statistics nan for ever.

    Args:
        norm: :math:`n_t`, a scalar.
        state: From :func:`zclip_state`; changed in place.
        z_threshold: :math:`z^\ast`, from which z-score on a norm is a spike.
        alpha: :math:`\alpha`, smoothing of mean and variance.
        max_norm: c, a bound on every step, also in the warm-up; ``None`` sets none.
        warmup_steps: How many norms make the first mean and variance.
        eps: :math:`\epsilon`.

    Returns:
        Tensor: The largest norm that this step may have, a scalar; it is ``norm`` itself where nothing is to be clipped.

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
    # Welford's running mean and variance in the warm-up, the exponential ones after it.
    new_mean = torch.where(warm, mean + (n - mean) / seen, alpha * mean + (1 - alpha) * threshold)
    warm_variance = (variance * count + (n - mean) * (n - new_mean)) / seen
    new_variance = torch.where(warm, warm_variance, alpha * variance + (1 - alpha) * (threshold - new_mean).square())
    for old, new in ((count, seen), (variance, new_variance), (mean, new_mean)):
        old.copy_(torch.where(finite, new, old))
    return threshold if max_norm is None else threshold.clamp(max=max_norm)
