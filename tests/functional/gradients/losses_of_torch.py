"""Losses of ``torch.nn.functional``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.functional.gradients.catalogue import (
    CLASS_WEIGHTS,
    Batch,
    H,
    V,
    entropies,
    errors,
    masked_shares,
    of,
    token_losses,
)


@of(errors)
def mse(n: Any, b: Batch) -> Tensor:
    return F.mse_loss(n(b.x), b.y)


@of(lambda n, b: errors(n, b) * H)
def mse_sum_over_b(n: Any, b: Batch) -> Tensor:
    return F.mse_loss(n(b.x), b.y, reduction="sum") / len(b)


@of(lambda n, b: F.smooth_l1_loss(n(b.x), b.y, reduction="none").mean(1))
def smooth_l1(n: Any, b: Batch) -> Tensor:
    return nn.SmoothL1Loss()(n(b.x), b.y)


@of(entropies)
def cross_entropy(n: Any, b: Batch) -> Tensor:
    return F.cross_entropy(n(b.x), b.c)


@of(
    lambda n, b: (
        F.cross_entropy(n(b.x), b.c, CLASS_WEIGHTS, label_smoothing=0.1, reduction="none")
        * len(b)
        / CLASS_WEIGHTS[b.c].sum()
    ),
    solo="own",
)
def class_weights_smoothed(n: Any, b: Batch) -> Tensor:
    return F.cross_entropy(n(b.x), b.c, CLASS_WEIGHTS, label_smoothing=0.1)


@of(lambda n, b: F.cross_entropy(n(b.x), b.y.softmax(1), reduction="none"))
def soft_labels(n: Any, b: Batch) -> Tensor:
    return F.cross_entropy(n(b.x), b.y.softmax(1))


@of(lambda n, b: F.binary_cross_entropy_with_logits(n(b.x), b.y.sigmoid(), reduction="none").mean(1))
def multilabel(n: Any, b: Batch) -> Tensor:
    return F.binary_cross_entropy_with_logits(n(b.x), b.y.sigmoid())


@of(lambda n, b: F.kl_div(n(b.x).log_softmax(1), b.y.softmax(1), reduction="none").sum(1))
def distillation(n: Any, b: Batch) -> Tensor:
    return F.kl_div(n(b.x).log_softmax(1), b.y.softmax(1), reduction="batchmean")


@of(lambda n, b: F.triplet_margin_loss(n(b.x), b.x, b.y, reduction="none"))
def triplet(n: Any, b: Batch) -> Tensor:
    return F.triplet_margin_loss(n(b.x), b.x, b.y)


@of(lambda n, b: F.gaussian_nll_loss(n(b.x), b.y, n(b.y).exp(), reduction="none").mean(1))
def gaussian_nll(n: Any, b: Batch) -> Tensor:
    return F.gaussian_nll_loss(n(b.x), b.y, n(b.y).exp())


def ctc_arguments(n: Any, b: Batch) -> tuple[Tensor, ...]:
    lengths = (torch.full((len(b),), b.s.shape[1]), b.c % 2 + 1)
    return n.tokens(b.s).log_softmax(2).transpose(0, 1), b.t[:, :2].clamp(1), *lengths


@of(lambda n, b: F.ctc_loss(*ctc_arguments(n, b), reduction="none") / ctc_arguments(n, b)[3])
def ctc(n: Any, b: Batch) -> Tensor:
    return F.ctc_loss(*ctc_arguments(n, b))


@of(masked_shares, solo="own")
def tokens_ignored(n: Any, b: Batch) -> Tensor:
    return F.cross_entropy(n.tokens(b.s).reshape(-1, V), b.t.masked_fill(~b.m, -100).reshape(-1))


@of(lambda n, b: token_losses(n, b).mean(1))
def segmentation(n: Any, b: Batch) -> Tensor:
    return F.cross_entropy(n.tokens(b.s).transpose(1, 2), b.t)


@of(lambda n, b: token_losses(n, b).mean(1))
def own_reduction(n: Any, b: Batch) -> Tensor:
    return F.cross_entropy(n.tokens(b.s).transpose(1, 2), b.t, reduction="none").mean()
