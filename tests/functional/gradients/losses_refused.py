"""Losses that are no sum over samples, or not known to be one."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

from tests.functional.gradients.catalogue import Batch, H, errors, refused
from tests.functional.gradients.losses_by_hand import mae
from tests.functional.gradients.losses_of_torch import mse


@refused("div .* mixes the samples")
def dice_over_the_batch(n: Any, b: Batch) -> Tensor:
    p, y = n(b.x).sigmoid(), (b.y > 0).double()
    return F.binary_cross_entropy_with_logits(n(b.x), y) + 1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)


@refused("div .* mixes the samples")
def learned_denominator(n: Any, b: Batch) -> Tensor:
    confidence = n(b.x)[:, 0].sigmoid()
    return (errors(n, b) * confidence).sum() / confidence.sum()


@refused("sqrt .* mixes the samples")
def rmse(n: Any, b: Batch) -> Tensor:
    return F.mse_loss(n(b.x), b.y).sqrt()


@refused("pow .* mixes the samples|pow .* are not the rows")
def variance_of_features(n: Any, b: Batch) -> Tensor:
    return (n(b.x).mean(0) ** 2).sum()


@refused("pow .* are not the rows|matmul .* mixes the samples")
def covariance(n: Any, b: Batch) -> Tensor:
    h = n(b.x)
    return ((h.T @ h / len(b) - torch.eye(H)) ** 2).sum()


@refused("std .* mixes the samples")
def spread(n: Any, b: Batch) -> Tensor:
    return n(b.x).std()


@refused("max .* mixes the samples")
def max_of_means(n: Any, b: Batch) -> Tensor:
    return ((n(b.x) - b.y) ** 2).mean(0).max()


@refused("topk .* mixes the samples")
def hard_examples(n: Any, b: Batch) -> Tensor:
    return errors(n, b).topk(4).values.mean()


@refused("sort .* mixes the samples")
def hard_examples_sorted(n: Any, b: Batch) -> Tensor:
    return errors(n, b).sort(descending=True).values[:4].mean()


@refused("clamp .* mixes the samples")
def clamped(n: Any, b: Batch) -> Tensor:
    return mse(n, b).clamp(max=10.0)


@refused("max .* mixes the samples")
def worst_head(n: Any, b: Batch) -> Tensor:
    return torch.max(mse(n, b), mae(n, b))


class Squares(torch.autograd.Function):
    """A loss with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(z, y)
        return ((z - y) ** 2).mean()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        z, y = ctx.saved_tensors
        return 2 * g * (z - y) / z.numel(), None


class Mean(Squares):
    """One whose node is called MeanBackward."""


@refused("SquaresBackward")
def own_function(n: Any, b: Batch) -> Tensor:
    return Squares.apply(n(b.x), b.y)


@refused("MeanBackward")
def own_function_called_mean(n: Any, b: Batch) -> Tensor:
    return Mean.apply(n(b.x), b.y)


@refused("CheckpointFunctionBackward")
def reentrant_checkpoint(n: Any, b: Batch) -> Tensor:
    return checkpoint(lambda z: (z**2).mean(), n(b.x), use_reentrant=True)


@refused("cross_entropy .* got .* rows for 6 samples|cross_entropy .* it is unknown which row")
def packed(n: Any, b: Batch) -> Tensor:
    lengths = b.m.sum(1)
    z = pack_padded_sequence(n.tokens(b.s), lengths, batch_first=True, enforce_sorted=False)
    t = pack_padded_sequence(b.t, lengths, batch_first=True, enforce_sorted=False)
    return F.cross_entropy(z.data, t.data)


@refused("are not the rows|mixes the samples")
def windows(n: Any, b: Batch) -> Tensor:
    return (n(b.x.reshape(-1).unfold(0, H, 1)).relu() ** 2).mean()


@refused("depends on parameters only")
def no_sample(n: Any, b: Batch) -> Tensor:
    return (n.lin.weight**2).sum()


@refused("combines parameters with a tensor that has no rows")
def data_without_rows(n: Any, b: Batch) -> Tensor:
    return mse(n, b) + n(b.x.mean(0)).sum()


@refused("changed in place")
def changed_in_place(n: Any, b: Batch) -> Tensor:
    losses = torch.zeros_like(b.y) + n(b.x)
    total = losses.mean()
    losses.mul_(2.0)
    return total
