"""Losses written by hand: one term, masked, gathered, in chunks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.functional.gradients.catalogue import (
    CLASS_WEIGHTS,
    QUANTILES,
    Batch,
    H,
    V,
    absolute,
    entropies,
    errors,
    masked_shares,
    of,
    token_losses,
)


@of(absolute)
def mae(n: Any, b: Batch) -> Tensor:
    return (n(b.x) - b.y).abs().mean()


def quantile_errors(n: Any, b: Batch) -> Tensor:
    error = b.y[:, :1, None] - n(b.x)[:, None, :3]
    return torch.max((QUANTILES - 1) * error, QUANTILES * error)


@of(lambda n, b: quantile_errors(n, b).sum(2).mean(1))
def quantile(n: Any, b: Batch) -> Tensor:
    return quantile_errors(n, b).sum(dim=-1).mean()


@of(lambda n, b: quantile_errors(n, b).sum(2).mean(1))
def quantile_loop(n: Any, b: Batch) -> Tensor:
    losses = []
    for i, q in enumerate((0.1, 0.5, 0.9)):
        error = b.y[:, :1] - n(b.x)[..., i : i + 1]
        losses.append(torch.max((q - 1) * error, q * error).unsqueeze(-1))
    return torch.cat(losses, dim=2).sum(2).mean()


@of(lambda n, b: (1 - (-entropies(n, b)).exp()) ** 2 * entropies(n, b))
def focal(n: Any, b: Batch) -> Tensor:
    entropy = F.cross_entropy(n(b.x), b.c, reduction="none")
    return ((1 - torch.exp(-entropy)) ** 2 * entropy).mean()


@of(lambda n, b: (n(b.x) - b.y).cosh().log().mean(1))
def log_cosh(n: Any, b: Batch) -> Tensor:
    return torch.log(torch.cosh(n(b.x) - b.y)).mean()


@of(lambda n, b: 2 * (n(b.x) - b.y).abs().mean(1) / (n(b.x).abs() + b.y.abs()).mean(1))
def smape(n: Any, b: Batch) -> Tensor:
    z = n(b.x)
    return (2 * (z - b.y).abs().mean(dim=1) / (z.abs() + b.y.abs()).mean(dim=1)).mean()


@of(masked_shares, solo="own")
def masked_mean(n: Any, b: Batch) -> Tensor:
    mask = b.m.double()
    return (token_losses(n, b) * mask).sum() / mask.sum()


@of(lambda n, b: (token_losses(n, b) * b.m).sum(1) / b.m.sum(1))
def masked_each(n: Any, b: Batch) -> Tensor:
    return ((token_losses(n, b) * b.m).sum(1) / b.m.sum(1)).mean()


@of(masked_shares, solo="own")
def masked_fill(n: Any, b: Batch) -> Tensor:
    return token_losses(n, b).masked_fill(~b.m, 0.0).sum() / b.m.sum()


@of(masked_shares, solo="own")
def where_mask(n: Any, b: Batch) -> Tensor:
    return torch.where(b.m, token_losses(n, b), torch.zeros(())).sum() / b.m.sum()


@of(masked_shares, solo="own")
def mask_index(n: Any, b: Batch) -> Tensor:
    return token_losses(n, b)[b.m].mean()


@of(masked_shares, solo="own")
def index_first(n: Any, b: Batch) -> Tensor:
    return F.cross_entropy(n.tokens(b.s)[b.m], b.t[b.m])


@of(masked_shares, solo="own")
def index_first_by_hand(n: Any, b: Batch) -> Tensor:
    logp = n.tokens(b.s).log_softmax(-1)[b.m]
    return -logp[torch.arange(len(logp)), b.t[b.m]].mean()


@of(lambda n, b: torch.where(b.y > 1, 0.0, (n(b.x) - b.y) ** 2).sum(1) * len(b) / (b.y <= 1).sum(), solo="own")
def nan_mean(n: Any, b: Batch) -> Tensor:
    return torch.nanmean(torch.where(b.y > 1, float("nan"), (n(b.x) - b.y) ** 2))


@of(lambda n, b: token_losses(n, b).mean(1))
def chunks(n: Any, b: Batch) -> Tensor:
    z, t = n.tokens(b.s).reshape(-1, V), b.t.reshape(-1)
    return torch.cat(
        [F.cross_entropy(i, j, reduction="none") for i, j in zip(z.split(8), t.split(8), strict=True)]
    ).mean()


@of(lambda n, b: token_losses(n, b).mean(1))
def chunk_sums(n: Any, b: Batch) -> Tensor:
    z, t = n.tokens(b.s).reshape(-1, V), b.t.reshape(-1)
    total = sum(F.cross_entropy(i, j, reduction="sum") for i, j in zip(z.split(8), t.split(8), strict=True))
    return total / t.numel()


@of(lambda n, b: -n(b.x).log_softmax(1).gather(1, b.c[:, None])[:, 0])
def gathered(n: Any, b: Batch) -> Tensor:
    return -n(b.x).log_softmax(1).gather(1, b.c[:, None]).mean()


@of(lambda n, b: -n(b.x).log_softmax(1).gather(1, b.c[:, None])[:, 0])
def picked(n: Any, b: Batch) -> Tensor:
    return -n(b.x).log_softmax(1)[range(len(b)), b.c].sum() / len(b)


@of(lambda n, b: errors(n, b) * H)
def einsum_squares(n: Any, b: Batch) -> Tensor:
    error = n(b.x) - b.y
    return torch.einsum("bi,bi->", error, error) / len(b)


@of(lambda n, b: errors(n, b) * H)
def dot_squares(n: Any, b: Batch) -> Tensor:
    error = (n(b.x) - b.y).flatten()
    return error.dot(error) / len(b)


@of(lambda n, b: ((n(b.x) - b.y) ** 2) @ CLASS_WEIGHTS)
def einsum_linear(n: Any, b: Batch) -> Tensor:
    return torch.einsum("bi,i->", (n(b.x) - b.y) ** 2, CLASS_WEIGHTS) / len(b)
