"""A weight that is rounded at the end of the fit.

Used only by :class:`lightning_grad.callbacks.LearnedRounding`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_grad.core import FoundWeight, ViewedWeight
from lightning_grad.core.views.portable import pack_bits, unpack_bits
from lightning_grad.functional import QuantizedTensor, SoftRounding, with_outliers
from lightning_grad.utilities.rounding import show_values
from lightning_grad.utilities.rounding_units import RoundableWeight


class RoundedWeight(ViewedWeight):
    """A dense parameter that trains as it is, until its rounding is known.

    Args:
        found: The weight.
        bits: Bits of its grid; ``None`` never rounds it.
        dim: Dimension of the output channels.
    """

    def __init__(self, found: FoundWeight, bits: int | None, dim: int) -> None:
        super().__init__(found)
        self.bits, self.dim = bits, dim
        self._shown: Tensor | None = None
        self._rounding: dict[str, Tensor] = {}
        self._values: Tensor | None = None
        self._quantized: QuantizedTensor | None = None

    @property
    def is_rounded(self) -> bool:
        """Whether its rounding is known."""
        return bool(self._rounding)

    @property
    @override
    def stores(self) -> bool:
        return self.is_rounded

    @override
    def value(self, weight: Tensor) -> Tensor:
        return weight if self._shown is None else self._shown

    @override
    def stored(self, weight: Tensor) -> Tensor:
        if not self._rounding:
            return weight
        if self._values is None:
            self._values, self._quantized = self._restore(weight)
        return self._values

    @property
    def quantized(self) -> QuantizedTensor:
        """Integers and scales of the rounded weight."""
        self.stored(self.before)
        assert self._quantized is not None
        return self._quantized

    @property
    def before(self) -> Tensor:
        """The weight for inference before it is rounded: the stored output of the earlier stages."""
        value = self.dense
        for other in self.chain.weights[: self.chain.weights.index(self)]:
            value = other.stored(value)
        return value

    def roundable(self, kept: Tensor | None) -> RoundableWeight:
        """Return what the reconstruction of the network needs to know."""
        assert self.bits is not None
        found = self.found
        uses = [(found.module, found.attribute), *found.twins]
        show = partial(show_values, uses) if found.in_place else self._show
        owners = [module for module, _ in uses]
        return RoundableWeight(self.name, self.before.clone(), owners, show, self.bits, self.dim, kept)

    def _show(self, value: Tensor | None) -> None:
        self._shown = value

    def round(self, rounded: QuantizedTensor, kept: Tensor | None) -> None:
        """Store the weight as rounded from now on."""
        up = rounded.integers > SoftRounding(self.before, rounded.bits, rounded.dim, rounded.scales, kept).below
        self._rounding = {"up": pack_bits(up), "scales": rounded.scales.cpu()}
        if kept is not None:
            self._rounding["kept"] = pack_bits(kept)
        self._values = None

    def forget(self) -> None:
        """Store the weight as it trains."""
        self._rounding, self._values = {}, None

    @torch.no_grad()
    def _restore(self, weight: Tensor) -> tuple[Tensor, QuantizedTensor]:
        assert self.bits is not None
        own = self._rounding
        kept = unpack_bits(own["kept"], weight) if "kept" in own else None
        start = SoftRounding(weight, self.bits, self.dim, own["scales"].to(weight.device), kept)
        up = unpack_bits(own["up"], weight)
        integers = torch.where(start.has_choice, start.below + up, start.nearest.integers).to(torch.int8)
        near = start.nearest
        rounded = QuantizedTensor(integers, near.scales, near.bits, near.quantizer, near.dim)
        return start.values(rounded), rounded if kept is None else with_outliers(rounded, weight, kept)

    @property
    @override
    def signature(self) -> list[str | int]:
        return [0 if self.bits is None else self.bits, self.dim]

    @override
    def state_dict(self) -> dict[str, Any]:
        return dict(self._rounding)

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._rounding, self._values = dict(state), None

    @override
    def __str__(self) -> str:
        return "not rounded" if self.bits is None else f"{self.bits} bits"
