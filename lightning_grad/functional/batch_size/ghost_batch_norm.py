"""Batch normalization over small parts of a large batch.

The callback is :class:`lightning_grad.callbacks.GhostBatchNorm`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm


def ghost_batch_norm(
    layer: _BatchNorm, inputs: Tensor, size: int, forward: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    r"""Normalize a batch in equal chunks, each by its own mean and variance (Ghost Batch Normalization).

    .. math::
        \hat x_i = \frac{x_i - \mu_{i \bmod k}}{\sqrt{\sigma_{i \bmod k}^2 + \epsilon}}

    The batch of n samples has :math:`k = \lceil n / \text{size} \rceil` chunks; sample i belongs to chunk
    :math:`i \bmod k`, and :math:`\mu, \sigma^2` are the mean and the variance of a chunk. Running statistics are
    updated once for each chunk, in order, as in the paper's algorithm 1.

    Chunks differ by at most one sample, and none has a single sample, whose variance would be 0. So three samples
    with size 2 are one chunk. A batch of at most ``size`` samples is normalized as a whole.

    Args:
        layer: BatchNorm layer in training mode.
        inputs: Batch, (N, C) or (N, C, ...).
        size: Largest number of samples in a chunk, at least 2.
        forward: What normalizes one chunk, if it is not the layer's ``forward``.

    Returns:
        Tensor: The normalized batch, of the shape of the inputs.

    Example:
        >>> layer = torch.nn.BatchNorm1d(1, affine=False)
        >>> ghost_batch_norm(layer, torch.tensor([[0.0], [10.0], [2.0], [20.0]]), size=2).flatten().round()
        tensor([-1., -1.,  1.,  1.])
        >>> layer.num_batches_tracked
        tensor(2)

    References:
        Hoffer et al., "Train longer, generalize better", 2017, arXiv 1705.08741, algorithm 1. It divides shuffled
        batches that are a multiple of the size, and does not say which samples form a chunk. With this choice, a
        contiguous batch is normalized by one call and is not copied.
    """
    normalize = layer.forward if forward is None else forward
    samples = len(inputs)
    chunks = min(-(-samples // size), samples // 2)
    if chunks < 2:
        return normalize(inputs)
    is_even = samples % chunks == 0
    if is_even and inputs.is_contiguous() and getattr(normalize, "__func__", None) is _BatchNorm.forward:
        return _in_one_call(layer, inputs, chunks)
    outputs = [normalize(inputs[number::chunks]) for number in range(chunks)]
    if is_even:
        return torch.stack(outputs, dim=1).flatten(0, 1)
    order = torch.arange(samples, device=inputs.device)
    return torch.cat(outputs)[torch.cat([order[number::chunks] for number in range(chunks)]).argsort()]


def _in_one_call(layer: _BatchNorm, inputs: Tensor, chunks: int) -> Tensor:
    """Normalize all chunks at once: the channels of one chunk are next to those of another, as a view of the batch."""
    layer._check_input_dim(inputs)  # type: ignore[no-untyped-call]
    joined = inputs.view(len(inputs) // chunks, chunks * inputs.shape[1], *inputs.shape[2:])
    weight, bias = (None if value is None else value.repeat(chunks) for value in (layer.weight, layer.bias))
    # The switch may also be set on a layer that has running statistics, to keep them as they are.
    if not layer.track_running_stats or layer.running_mean is None or layer.running_var is None:
        return F.batch_norm(joined, None, None, weight, bias, training=True, eps=layer.eps).view_as(inputs)
    # With a momentum of 1, these become the statistics of each chunk.
    mean, var = (torch.zeros_like(each).repeat(chunks) for each in (layer.running_mean, layer.running_var))
    outputs = F.batch_norm(joined, mean, var, weight, bias, training=True, momentum=1.0, eps=layer.eps)
    _follow(layer, mean.view(chunks, -1), var.view(chunks, -1))
    return outputs.view_as(inputs)


@torch.no_grad()
def _follow(layer: _BatchNorm, means: Tensor, variances: Tensor) -> None:
    """Update the running statistics as by one pass for each chunk."""
    chunks = len(means)
    tracked = layer.num_batches_tracked
    if tracked is not None:
        tracked.add_(chunks)
    for running, values in ((layer.running_mean, means), (layer.running_var, variances)):
        assert running is not None
        if layer.momentum is None:  # the mean over all batches
            assert tracked is not None
            running.add_((values - running).sum(0) / tracked)
        else:
            kept = 1.0 - layer.momentum
            later = torch.arange(chunks - 1, -1, -1, device=values.device, dtype=values.dtype)  # chunks after each
            running.mul_(kept**chunks).add_(kept**later @ values, alpha=layer.momentum)
