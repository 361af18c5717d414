"""The adapter of one weight in :class:`~lightning_grad.callbacks.LoRA`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_grad.core import Adapter, FoundWeight
from lightning_grad.functional import lora_ga_factors, lora_norm, merge_lora


class LowRankAdapter(Adapter):
    """A frozen weight with the product of two small matrices.

    Args:
        found: The weight.
        rank: Rank of the product.
        scale: Factor of the product.
        generator: Draws the start of A.
    """

    def __init__(self, found: FoundWeight, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__(found)
        self.rank = rank
        self.scale = scale
        self._generator = generator
        self._origin: dict[str, Tensor] = {}

    @property
    def sides(self) -> tuple[int, int]:
        """Number of outputs, and of inputs or entries of a kernel."""
        shape = self.shape[::-1] if self.is_transposed else self.shape
        return shape[0], math.prod(shape[1:])

    @override
    def start(self) -> Mapping[str, Tensor]:
        outputs, inputs = self.sides
        bound = 1 / math.sqrt(inputs)  # Kaiming's with a = sqrt(5), as in the released code and in peft
        # Drawn on the CPU, so the start is the same on all devices.
        a = torch.empty(self.rank, inputs).uniform_(-bound, bound, generator=self._generator)
        return {"lora_A": a.to(self.frozen), "lora_B": self.frozen.new_zeros(outputs, self.rank)}

    @torch.no_grad()
    def start_from(self, gradient: Tensor) -> None:
        """Start from the gradient of the weight (LoRA-GA); the function of the layer stays the same."""
        turned = gradient.t() if self.is_transposed else gradient.flatten(1)
        for parameter, value in zip(self.own.values(), lora_ga_factors(turned, self.rank), strict=True):
            parameter.copy_(value)
        self._origin = {f"{name}_start": value.detach().clone() for name, value in self.own.items()}
        self.shift()

    @torch.no_grad()
    def shift(self) -> None:
        """Subtract the product from the frozen weight."""
        self.frozen.copy_(self._merged(self.frozen, -self.scale))

    @override
    def merged(self, weight: Tensor) -> Tensor:
        return self._merged(weight, self.scale)

    def _merged(self, weight: Tensor, scale: float) -> Tensor:
        return merge_lora(weight, self.own["lora_A"], self.own["lora_B"], scale, self.is_transposed)

    @override
    def output(self, x: Tensor, frozen: Callable[[Tensor], Tensor]) -> Tensor:
        change = self.two_products(x, self.own["lora_A"], self.own["lora_B"])
        return torch.add(frozen(x), change, alpha=self.scale)

    @functools.cached_property
    def _size(self) -> Tensor:
        size: Tensor = torch.linalg.vector_norm(_at_least_float32(self.frozen.detach()))
        return size

    @torch.no_grad()
    def relative_change(self) -> Tensor:
        """Return the norm of the change since the start of the run, relative to that of the weight."""
        a, b = self.factors()
        norm: Tensor = self.scale * lora_norm(_at_least_float32(a), _at_least_float32(b))
        return norm / self._size

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A and B of the change since the start of the run."""
        a, b = (value.detach() for value in self.own.values())
        if not self._origin:
            return a, b
        first_a, first_b = (value.to(a) for value in self._origin.values())
        return torch.cat([a, first_a]), torch.cat([b, -first_b], dim=1)

    @override
    def start_again(self) -> None:
        super().start_again()
        self._origin = {}
        self.__dict__.pop("_size", None)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), **self._origin, "scale": self.scale, "is_transposed": self.is_transposed}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._origin = {name: value for name, value in state.items() if name.endswith("_start")}

    def __str__(self) -> str:
        return f"rank {self.rank}"


def _at_least_float32(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))
