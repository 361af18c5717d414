"""The factors of one weight in :class:`~lightning_grad.callbacks.LowRankFinetuning`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_grad.core import Adapter, FoundWeight
from lightning_grad.functional import low_rank_factors


class FactoredWeight(Adapter):
    """A product U V in place of a weight, whose memory is free during the fit.

    Args:
        found: The weight.
    """

    keeps_weight: ClassVar[bool] = False

    def __init__(self, found: FoundWeight) -> None:
        super().__init__(found)
        self.singular_values = torch.linalg.svdvals(self._matrix(found.parameter.detach().float()))
        self.rank = self.full_rank

    @property
    def full_rank(self) -> int:
        """The smaller side of the weight as a matrix."""
        return len(self.singular_values)

    @property
    def cut(self) -> float:
        """The share of the rank that is dropped."""
        return 1.0 - self.rank / self.full_rank

    def _matrix(self, weight: Tensor) -> Tensor:
        """Return a weight as a matrix (out, in)."""
        return weight.t() if self.is_transposed else weight.flatten(1)

    @override
    def start(self) -> Mapping[str, Tensor]:
        u, v = low_rank_factors(self._matrix(self.frozen), self.rank)
        return {"U": u, "V": v}

    @override
    def merged(self, weight: Tensor) -> Tensor:
        return self._product(self.own["U"], self.own["V"])

    def _product(self, u: Tensor, v: Tensor) -> Tensor:
        return v.t() @ u.t() if self.is_transposed else (u @ v).view(self.shape)

    @override
    def output(self, x: Tensor, frozen: Callable[[Tensor], Tensor]) -> Tensor:
        layer: Any = self.layer
        return self.two_products(x, self.own["V"], self.own["U"], layer.bias)

    @torch.no_grad()
    def cut_in_place(self) -> None:
        """Replace the weight by its approximation, which does not train."""
        u, v = low_rank_factors(self._matrix(self.frozen), self.rank)
        self.frozen.copy_(self._product(u, v))

    @property
    def num_factors(self) -> int:
        """Number of entries of U and V."""
        outputs = self.shape[1] if self.is_transposed else self.shape[0]
        return self.rank * (outputs + self.shape.numel() // outputs)

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.full_rank}"
