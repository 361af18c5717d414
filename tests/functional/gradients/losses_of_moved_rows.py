"""Losses of steps that move rows: loops, views, sorting, time first."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.functional.gradients.catalogue import Batch, H, V, errors, of, token_losses


@of(errors)
def stack_of_a_loop(n: Any, b: Batch) -> Tensor:
    z = n(b.x)
    return torch.stack([((z[i] - b.y[i]) ** 2).mean() for i in range(len(z))]).mean()


@of(errors)
def sum_of_a_loop(n: Any, b: Batch) -> Tensor:
    return sum(F.mse_loss(i, j) for i, j in zip(n(b.x), b.y, strict=True)) / len(b)


@of(errors)
def running_sum(n: Any, b: Batch) -> Tensor:
    return sum(row.sum() for row in (n(b.x) - b.y) ** 2) / b.y.numel()


@of(lambda n, b: (n(b.x) * b.y).sum(1))
def diagonal_of_products(n: Any, b: Batch) -> Tensor:
    return (n(b.x) @ b.y.T).diagonal().mean()


@of(lambda n, b: errors(n, b) * torch.eye(len(b))[2 % len(b)] * len(b), solo="")
def one_row(n: Any, b: Batch) -> Tensor:
    return ((n(b.x) - b.y) ** 2)[2 % len(b)].mean()


@of(lambda n, b: 1.5 * errors(n, b))
def stacked_heads(n: Any, b: Batch) -> Tensor:
    error = (n(b.x) - b.y) ** 2
    return torch.stack(tensors=[error, 2 * error]).mean()


@of(errors)
def loop_backwards(n: Any, b: Batch) -> Tensor:
    z = n(b.x)
    return torch.stack([((z[i] - b.y[i]) ** 2).mean() for i in reversed(range(len(z)))]).mean()


@of(lambda n, b: token_losses(n, b).mean(1))
def time_first(n: Any, b: Batch) -> Tensor:
    return F.cross_entropy(n.tokens(b.s).transpose(1, 2), b.t, reduction="none").T.mean()


@of(lambda n, b: (token_losses(n, b) ** 2).mean(1))
def time_first_inside(n: Any, b: Batch) -> Tensor:
    z = n.tokens(b.s).transpose(0, 1)  # (T, B, V), as recurrent networks want it
    losses = F.cross_entropy(z.permute(1, 2, 0), b.t, reduction="none") ** 2
    return losses.transpose(0, 1).mean()


@of(lambda n, b: (n(b.x) ** 2).mean(1) + (n(b.y) ** 2).mean(1))
def two_views(n: Any, b: Batch) -> Tensor:
    return 2 * (n(torch.cat([b.x, b.y])) ** 2).mean(1).mean()


@of(lambda n, b: (n(b.x) ** 2).mean(1) + (n(b.y) ** 2).mean(1))
def two_views_of_the_output(n: Any, b: Batch) -> Tensor:
    return 2 * torch.cat([n(b.x), n(b.y)]).pow(2).mean()


@of(lambda n, b: token_losses(n, b).mean(1) + token_losses(n, replace(b, s=b.s.flip(1))).mean(1))
def two_views_of_tokens(n: Any, b: Batch) -> Tensor:
    z = n.tokens(torch.cat([b.s, b.s.flip(1)])).view(-1, V)
    return 2 * F.cross_entropy(z, torch.cat([b.t, b.t]).view(-1))


@of(lambda n, b: simclr_of(n, b), solo="")
def simclr(n: Any, b: Batch) -> Tensor:
    z = F.normalize(n(torch.cat([b.x, b.y])))
    similar = (z @ z.detach().T / 0.5).masked_fill(torch.eye(len(z), dtype=torch.bool), -1e9)
    return F.cross_entropy(similar, torch.arange(len(z)).roll(len(b)))


def simclr_of(n: Any, b: Batch) -> Tensor:
    z = F.normalize(n(torch.cat([b.x, b.y])))
    similar = (z @ z.detach().T / 0.5).masked_fill(torch.eye(len(z), dtype=torch.bool), -1e9)
    return F.cross_entropy(similar, torch.arange(len(z)).roll(len(b)), reduction="none").view(2, -1).mean(0)


@of(lambda n, b: (n(b.x) ** 2).mean(1))
def repeated(n: Any, b: Batch) -> Tensor:
    return (n(b.x.repeat(3, 1)) ** 2).mean()


@of(lambda n, b: (n(b.x) ** 2).mean(1))
def repeat_interleaved(n: Any, b: Batch) -> Tensor:
    return (n(b.x.repeat_interleave(2, 0)) ** 2).mean()


@of(errors)
def sorted_in_the_step(n: Any, b: Batch) -> Tensor:
    order = b.y[:, 0].argsort()
    return ((n(b.x[order]) - b.y[order]) ** 2).mean(1).mean()


@of(lambda n, b: errors(n, b) * (b.c > 2) * len(b) / (b.c > 2).sum(), solo="own")
def some_rows(n: Any, b: Batch) -> Tensor:
    keep = b.c > 2
    return F.mse_loss(n(b.x[keep]), b.y[keep])


@of(lambda n, b: torch.cat([(n(b.x[:2]) ** 2).mean(1), (n(b.x[2:]) ** 2).mean(1) * 0.5]) * 3, solo="")
def parts_of_the_batch(n: Any, b: Batch) -> Tensor:
    labelled, rest = n(b.x).split([2, len(b) - 2])
    return labelled.pow(2).mean() + rest.pow(2).mean()


@of(errors)
def put_in_place(n: Any, b: Batch) -> Tensor:
    order = b.y[:, 0].argsort()
    out = torch.zeros(len(b), dtype=torch.float64)
    out[order] = ((n(b.x[order]) - b.y[order]) ** 2).mean(1)
    return out.mean()


@of(lambda n, b: (torch.cat([n.cls.expand(len(b), -1, -1), n.tokens(b.s)], 1) ** 2).mean((1, 2)))
def class_token(n: Any, b: Batch) -> Tensor:
    return (torch.cat([n.cls.expand(len(b), -1, -1), n.tokens(b.s)], dim=1) ** 2).mean()


@of(lambda n, b: (n(b.x) ** 2).mean(1) + 0 * b.e[:, 0])
def pooled_graphs(n: Any, b: Batch) -> Tensor:
    nodes = torch.arange(len(b)).repeat_interleave(torch.arange(len(b)) + 1)
    pooled = torch.zeros(len(b), H, dtype=torch.float64).index_add(0, nodes, n(b.x[nodes]))
    return ((pooled / torch.bincount(nodes)[:, None]) ** 2).mean()
