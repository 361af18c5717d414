"""The norm test: how many samples a step needs, so the noise of its gradient is small against the gradient.

The callback is :class:`lightning_grad.callbacks.AdaptiveBatchSize`.
"""

import torch
from torch import Tensor


def norm_test_batch_size(noise: Tensor, signal: Tensor, eta: float, batch_size: float | None = None) -> Tensor:
    r"""Return the smallest batch size that passes the norm test.

    .. math::
        B = \frac{\operatorname{Var}_i}{\eta^2 \lVert g \rVert^2}

    :math:`\operatorname{Var}_i` is the trace of the covariance of per-sample gradients. Take it and
    :math:`\lVert g \rVert^2` from :func:`~lightning_grad.functional.noise_scale_terms`.

    The paper takes the norm of the gradient of the batch, whose square is too large by
    :math:`\operatorname{Var}_i / B` on average. So it asks for too few samples. Pass ``batch_size`` to do the same.

    Args:
        noise: :math:`\operatorname{Var}_i`, a scalar.
        signal: Squared norm of the true gradient, a scalar.
        eta: Largest ratio of noise to signal, above 0.
        batch_size: Samples of the measured batch, for the paper's estimate. Default: the estimate without bias.

    Returns:
        Tensor: B, a scalar, at least 0; infinite if the signal is not positive, nan if a number is not finite.

    Example:
        >>> noise, signal = torch.tensor(200.0), torch.tensor(4.0)
        >>> norm_test_batch_size(noise, signal, eta=0.5).item()
        200.0
        >>> norm_test_batch_size(noise, signal, eta=0.5, batch_size=50).item()
        100.0

    References:
        Lau, Liu and Kolar, "AdAdaGrad: Adaptive Batch Size Schemes for Adaptive Gradient Methods", 2024, arXiv
        2402.11215. The estimate without bias is from arXiv 1812.06162, appendix A.1.
    """
    squared = signal if batch_size is None else signal + noise / batch_size
    wanted = noise.clamp(min=0.0) / (eta**2 * squared.clamp(min=0.0))
    unknown = ~(noise.isfinite() & signal.isfinite())
    return torch.where(unknown, torch.full_like(wanted, torch.nan), wanted.nan_to_num(nan=0.0, posinf=torch.inf))


def next_accumulation(batches: int, now: int, wanted: int) -> int:
    """Return the largest number of accumulated batches, from ``now`` to ``wanted``, that may start after a batch.

    Lightning sets gradients to zero where the number of batches of the epoch is a multiple of the accumulated ones.
    Another number may only start where that holds for both, or a step would include gradients of the step before.

    Args:
        batches: Batches of the epoch so far; after a step, so a multiple of ``now``.
        now: Accumulated batches until now.
        wanted: Accumulated batches to reach.

    Example:
        >>> [next_accumulation(batches, now=2, wanted=6) for batches in (2, 4, 6, 8, 12)]
        [2, 4, 6, 4, 6]
    """
    return next((number for number in range(wanted, now, -1) if batches % number == 0), now)
