"""A network, a batch, and the losses that are registered for them, each with what its samples contribute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

B, T, V, H = 6, 5, 7, 8
QUANTILES = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
CLASS_WEIGHTS = torch.linspace(0.5, 2, H, dtype=torch.float64)


class Net(nn.Module):
    """Some layers in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(H, H)
        self.decode = nn.Linear(4, H)
        self.tokens = nn.Embedding(9, V)
        self.six = nn.Linear(H, B)
        self.scales = nn.Parameter(torch.tensor([0.3, -0.2]))
        self.cls = nn.Parameter(torch.randn(1, 1, V))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x)


@dataclass(frozen=True)
class Batch:
    """A batch of B samples."""

    x: Tensor
    y: Tensor
    e: Tensor
    c: Tensor
    s: Tensor
    t: Tensor
    m: Tensor

    def __getitem__(self, index: Any) -> Batch:
        return replace(self, **{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def __len__(self) -> int:
        return len(self.x)


def make_batch(seed: int = 1, samples: int = B, time: int = T) -> Batch:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    lengths = torch.randint(1, time + 1, (samples,), generator=g)
    lengths[0] = time
    return Batch(
        x=normal(samples, H),
        y=normal(samples, H),
        e=normal(samples, 4),
        c=torch.randint(0, H, (samples,), generator=g),
        s=torch.randint(0, 9, (samples, time), generator=g),
        t=torch.randint(0, V, (samples, time), generator=g),
        m=torch.arange(time)[None] < lengths[:, None],
    )


Step = Callable[[Any, Batch], Tensor]


def zero(n: Any, b: Batch) -> Tensor:
    return torch.zeros((), dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """A loss that is a mean of shares and a constant."""

    loss: Step
    shares: Step
    constant: Step = zero
    learned: str = ""  # the factor for which weights are refused
    solo: str = "both"  # which of "own", "share" is the loss of the sample alone
    tolerance: float = 1e-12


CASES: dict[str, Case] = {}
REFUSED: dict[str, tuple[Step, str]] = {}


def of(shares: Step, **options: Any) -> Callable[[Step], Step]:
    """Register a loss with the shares of its samples."""

    def register(loss: Step) -> Step:
        CASES[loss.__name__] = Case(loss, shares, **options)
        return loss

    return register


def refused(words: str) -> Callable[[Step], Step]:
    """Register a loss that is no sum over samples, or not known to be one."""

    def register(loss: Step) -> Step:
        REFUSED[loss.__name__] = (loss, words)
        return loss

    return register


def errors(n: Any, b: Batch) -> Tensor:
    return ((n(b.x) - b.y) ** 2).mean(1)


def absolute(n: Any, b: Batch) -> Tensor:
    return (n(b.x) - b.y).abs().mean(1)


def entropies(n: Any, b: Batch) -> Tensor:
    return F.cross_entropy(n(b.x), b.c, reduction="none")


def token_losses(n: Any, b: Batch) -> Tensor:
    return F.cross_entropy(n.tokens(b.s).transpose(1, 2), b.t, reduction="none")


def masked_shares(n: Any, b: Batch) -> Tensor:
    return (token_losses(n, b) * b.m).sum(1) * len(b) / b.m.sum()
