"""Batch normalization over small parts of a large batch.

The callback is :class:`lightning_grad.callbacks.GhostBatchNorm`.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def ghost_batch_norm(normalize: Callable[[Tensor], Tensor], inputs: Tensor, size: int) -> Tensor:
    r"""Normalize a batch in equal chunks, each by its own mean and variance (Ghost Batch Normalization).

    .. math::
        \hat x_i = \frac{x_i - \mu_{c(i)}}{\sqrt{\sigma_{c(i)}^2 + \epsilon}}

    :math:`c(i)` is the chunk of sample i, and :math:`\mu, \sigma^2` are the mean and the variance of a chunk. A layer
    with running statistics updates them once for each chunk, in order, as in the paper's algorithm 1.

    Chunks differ by at most one sample, and none has a single sample, whose variance would be 0. So three samples
    with size 2 are one chunk. A batch of at most ``size`` samples is passed on as it is.

    Args:
        normalize: A BatchNorm layer in training mode, or another function of a batch.
        inputs: Batch, (N, C) or (N, C, ...).
        size: Largest number of samples in a chunk, at least 2.

    Returns:
        Tensor: The normalized batch, of the shape of the inputs.

    Example:
        >>> layer = torch.nn.BatchNorm1d(1, affine=False)
        >>> ghost_batch_norm(layer, torch.tensor([[0.0], [2.0], [10.0], [20.0]]), size=2).flatten().round()
        tensor([-1.,  1., -1.,  1.])
        >>> layer.num_batches_tracked
        tensor(2)

    References:
        Hoffer et al., "Train longer, generalize better", 2017, arXiv 1705.08741, algorithm 1. It leaves open how a
        batch is divided that is no multiple of the size.
    """
    samples = len(inputs)
    chunks = min(-(-samples // size), samples // 2)
    if chunks < 2:
        return normalize(inputs)
    return torch.cat([normalize(chunk) for chunk in inputs.tensor_split(chunks)])
