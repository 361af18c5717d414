"""Steps in which the first dimension is k B by coincidence, or in which rows move out of sight."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.functional.gradients.catalogue import B, Batch, H, Step, V, absolute

_STORED = torch.Generator().manual_seed(7)
FISHER, OLD, QUEUE = (torch.rand(B, H, dtype=torch.float64, generator=_STORED) for _ in range(3))


def means_over_the_batch(n: Any, b: Batch) -> Tensor:
    """(C,) with as many classes as samples, then squared."""
    return ((n.six(b.x) ** 2).mean(0) ** 2).sum()


def as_many_experts_as_samples(n: Any, b: Batch) -> Tensor:
    gates = n.six(b.x).softmax(1)
    used = F.one_hot(gates.argmax(1), B).double().mean(0)
    return (n.six(b.x) ** 2).mean() + B * (used * gates.mean(0)).sum()


def elastic_weights(n: Any, b: Batch) -> Tensor:
    """A stored (B, .) importance of a weight with B rows."""
    return absolute(n, b).mean() + (FISHER * (n.six.weight - OLD) ** 2).sum()


def memory_queue(n: Any, b: Batch) -> Tensor:
    """Rows of earlier batches next to those of this one."""
    return (n(torch.cat([b.x, QUEUE])) ** 2).mean(1).mean()


def sorted_by_numpy(n: Any, b: Batch) -> Tensor:
    order = b.y[:, 0].numpy().argsort().tolist()
    x, y = b.x.numpy()[order], b.y.numpy()[order]
    return ((n(torch.from_numpy(x)) - torch.from_numpy(y)) ** 2).mean(1).mean()


def time_first_and_flat(n: Any, b: Batch) -> Tensor:
    tokens, targets = (torch.from_numpy(t.numpy().T.copy()) for t in (b.s, b.t))
    return (F.cross_entropy(n.tokens(tokens).reshape(-1, V), targets.reshape(-1), reduction="none") ** 2).mean()


def nodes_of_graphs(n: Any, b: Batch) -> Tensor:
    """12 nodes of 6 graphs, unequal, made by the data set: the first graph has one, the second three."""
    counts = (b.c % 3 + 1).tolist()
    counts[-1] += 2 * B - sum(counts) if sum(counts) < 2 * B else 0
    nodes = torch.from_numpy(b.x.numpy().repeat(counts, axis=0)[: 2 * B])
    return (n(nodes) ** 2).mean()


def two_views_by_numpy(n: Any, b: Batch) -> Tensor:
    x = torch.from_numpy(torch.cat([b.x, b.x + 1]).numpy().copy())
    return (n(x) ** 2).mean()


COINCIDENCES: dict[str, Step] = {
    step.__name__: step
    for step in (
        means_over_the_batch,
        as_many_experts_as_samples,
        elastic_weights,
        memory_queue,
        sorted_by_numpy,
        time_first_and_flat,
        nodes_of_graphs,
        two_views_by_numpy,
    )
}
# What following the rows makes of them without a proof: right shares, a refusal, or nothing, as there is nothing to see.
FOLLOWED: dict[str, Step | str] = {
    "means_over_the_batch": "pow .* mixes the samples",
    "as_many_experts_as_samples": lambda n, b: (n.six(b.x) ** 2).mean(1) + B * balance(n, b),
    "memory_queue": "are not the rows",
}


def balance(n: Any, b: Batch) -> Tensor:
    gates = n.six(b.x).softmax(1)
    return gates @ F.one_hot(gates.argmax(1), B).double().mean(0)
