"""Losses in which samples meet: contrastive ones, experts, batch norm, and partners from the batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.functional.gradients.catalogue import Batch, H, errors, of

# What a batch has in common without a graph, or by a product with each sample.


@of(
    lambda n, b: b.m.double().sum(1) / b.m.sum() * len(b) * (n(b.x) ** 2).mean(1),
    solo="own",
)
def weights_of_the_batch(n: Any, b: Batch) -> Tensor:
    weight = b.m.double().sum(1) / b.m.sum()
    return (weight * (n(b.x) ** 2).mean(1)).sum()


@of(
    lambda n, b: F.cross_entropy(
        (z := F.normalize(n(b.x))) @ z.T.detach() / 0.5, torch.arange(len(b)), reduction="none"
    ),
    solo="",
)
def info_nce(n: Any, b: Batch) -> Tensor:
    z = F.normalize(n(b.x))
    return F.cross_entropy(z @ z.T.detach() / 0.5, torch.arange(len(b)))


def similarities(n: Any, b: Batch) -> Tensor:
    return F.normalize(n(b.x)) @ F.normalize(n(b.y)).T / 0.5


def clip_of(n: Any, b: Batch) -> Tensor:
    logits, same = similarities(n, b), torch.arange(len(b))
    by_row, by_column = (F.cross_entropy(z, same, reduction="none") for z in (logits, logits.T))
    return (by_row + by_column) / 2


@of(clip_of, solo="")
def clip(n: Any, b: Batch) -> Tensor:
    logits, same = similarities(n, b), torch.arange(len(b))
    return (F.cross_entropy(logits, same) + F.cross_entropy(logits.t(), same)) / 2


def simclr_with_graph_of(n: Any, b: Batch) -> Tensor:
    z = F.normalize(n(torch.cat([b.x, b.y])))
    similar = (z @ z.T / 0.5).masked_fill(torch.eye(len(z), dtype=torch.bool), -1e9)
    return F.cross_entropy(similar, torch.arange(len(z)).roll(len(b)), reduction="none").view(2, -1).mean(0)


@of(simclr_with_graph_of, solo="")
def simclr_with_graph(n: Any, b: Batch) -> Tensor:
    z = F.normalize(n(torch.cat([b.x, b.y], dim=0)), dim=1)
    similar = torch.mm(z, z.t()) / 0.5
    similar = similar.masked_fill(torch.eye(len(z), dtype=torch.bool), -1e9)
    return F.cross_entropy(similar, torch.arange(len(z)).roll(len(b)))


def balance(n: Any, b: Batch) -> Tensor:
    gates = n(b.x).softmax(1)
    return 0.8 * gates @ F.one_hot(gates.argmax(1), H).double().mean(0)


@of(lambda n, b: errors(n, b) + balance(n, b), solo="")
def experts(n: Any, b: Batch) -> Tensor:
    gates = n(b.x).softmax(1)
    used = F.one_hot(gates.argmax(1), H).double().mean(0)
    return F.mse_loss(n(b.x), b.y) + 0.8 * (used * gates.mean(0)).sum()


@of(lambda n, b: ((F.batch_norm(n(b.x), None, None, training=True) - b.y) ** 2).mean(1), solo="")
def batch_norm(n: Any, b: Batch) -> Tensor:
    return ((F.batch_norm(n(b.x), None, None, training=True) - b.y) ** 2).mean()


@of(lambda n, b: gradient_penalty_of(n, b))
def gradient_penalty(n: Any, b: Batch) -> Tensor:
    x = b.x.clone().requires_grad_()
    out = n.decode(n(x)[:, :4].tanh())
    (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return out.mean() + 10 * ((gradient.norm(2, dim=1) - 1) ** 2).mean()


def gradient_penalty_of(n: Any, b: Batch) -> Tensor:
    x = b.x.clone().requires_grad_()
    out = n.decode(n(x)[:, :4].tanh())
    (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return out.mean(1) + 10 * ((gradient.norm(2, dim=1) - 1) ** 2)


@of(lambda n, b: b.x.clone().requires_grad_().sum(1) + errors(n, b))
def leaf_with_rows(n: Any, b: Batch) -> Tensor:
    return b.x.clone().requires_grad_().sum(1).mean() + errors(n, b).mean()


# A row with a partner from the batch belongs to its own sample. Other batches have other partners.


def mixed_up(n: Any, b: Batch) -> Tensor:
    return n(0.7 * b.x + 0.3 * b.x[torch.arange(len(b)).roll(1)])


def mixup_of(n: Any, b: Batch) -> Tensor:
    first, second = (F.cross_entropy(mixed_up(n, b), c, reduction="none") for c in (b.c, b.c.roll(1)))
    return 0.7 * first + 0.3 * second


@of(mixup_of, solo="partners")
def mixup(n: Any, b: Batch) -> Tensor:
    z = mixed_up(n, b)
    return 0.7 * F.cross_entropy(z, b.c) + 0.3 * F.cross_entropy(z, b.c.roll(1))


def negatives_of(n: Any, b: Batch) -> Tensor:
    z = n(b.x)
    near, far = ((z - n(b.y)) ** 2).sum(1), ((z - z[torch.arange(len(b)).roll(2)]) ** 2).sum(1)
    return (near - far + 1.0).relu()


@of(negatives_of, solo="partners")
def negatives_of_the_batch(n: Any, b: Batch) -> Tensor:
    z = n(b.x)
    far = (z - z.roll(2, 0)).pow(2).sum(1)
    return F.relu((z - n(b.y)).pow(2).sum(1) - far + 1.0).mean()
