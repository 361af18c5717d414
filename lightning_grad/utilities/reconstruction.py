"""Round the weights of a network one layer after another, so each layer keeps its output.

The layers are visited in the order of the forward pass. Each one is given the inputs that it gets after the layers before
it were rounded, and the outputs that it had before, and learns its roundings from them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_grad.functional import LearnedRoundings, QuantizedTensor, SoftRounding, learn_rounding
from lightning_grad.utilities.rounding_units import RoundableWeight, Run, Unit
from lightning_grad.utilities.unit_error import Calls, UnitError, record_calls


@dataclass(frozen=True)
class RoundedUnit:
    """The result of one unit.

    Args:
        name: Name of the layer or block.
        weights: Its weights.
        found: Their roundings, and the errors.
        values: The rounded weights.
    """

    name: str
    weights: Sequence[RoundableWeight]
    found: LearnedRoundings
    values: Sequence[Tensor]

    @classmethod
    def nearest(cls, weight: RoundableWeight) -> RoundedUnit:
        """Return the rounding of a weight that no forward pass uses: to the nearest levels."""
        start = weight.start()
        return cls(
            weight.name, [weight], LearnedRoundings([start.nearest], 0.0, 0.0, 0.0), [start.values(start.nearest)]
        )

    @property
    def relative_error(self) -> float:
        """Error of the output, relative to that of rounding to the nearest levels; 1 if that has none."""
        return self.found.error / self.found.nearest_error if self.found.nearest_error else 1.0


class Reconstruction:
    """Rounds the units of a network, one after another.

    Args:
        units: Result of :func:`find_units`.
        runs: Run the network on one batch each, always with the same result.
        steps: Steps of :func:`learn_rounding` for each unit; 0 rounds to the nearest levels.
        strength: Its penalty.
        flips: Flip single roundings afterwards, in layers that are linear in their weight.
        seed: Seed of the order of the batches.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        runs: Sequence[Run],
        steps: int = 1000,
        strength: float = 10.0,
        flips: bool = True,
        seed: int = 0,
    ) -> None:
        self.units, self._runs = units, runs
        self._steps, self._strength, self._flips, self._seed = steps, strength, flips, seed
        self._weights = [weight for unit in units for weight in unit.weights]

    @torch.no_grad()
    def __iter__(self) -> Iterator[RoundedUnit]:
        """Round one unit after another. Afterwards the network computes with its own weights again."""
        rounded: dict[str, Tensor] = {}
        try:
            for unit in self.units:
                result = self._round(unit, rounded)
                rounded |= {weight.name: value for weight, value in zip(unit.weights, result.values, strict=True)}
                yield result
        finally:
            for weight in self._weights:
                weight.show(None)

    def _round(self, unit: Unit, rounded: dict[str, Tensor]) -> RoundedUnit:
        outcome = UnitError(unit, *self._calls(unit, rounded))
        starts = [weight.start() for weight in unit.weights]
        count = len(outcome)
        found = learn_rounding(starts, outcome, count, self._steps, self._strength, seed=self._seed)
        if self._steps and self._flips and unit.is_layer and found.nearest_error:
            found = self._flipped(outcome, starts[0], found)
        for weight in unit.weights:
            weight.show(None)
        values = [start.values(each) for start, each in zip(starts, found.rounded, strict=True)]
        return RoundedUnit(unit.name, unit.weights, found, values)

    def _calls(self, unit: Unit, rounded: dict[str, Tensor]) -> tuple[Calls, Calls]:
        """Return the calls of a unit in the network as it was, and after the units before it were rounded."""
        for weight in self._weights:
            weight.show(None)
        before = record_calls(unit.module, self._runs)
        for weight in self._weights:
            weight.show(rounded.get(weight.name))
        after = record_calls(unit.module, self._runs) if rounded else before
        # Rounding can change which rows a layer gets, as in a mixture of experts; their outputs are then not comparable.
        return before, after if after.shapes == before.shapes else before

    def _flipped(self, outcome: UnitError, start: SoftRounding, found: LearnedRoundings) -> LearnedRoundings:
        """Flip single roundings, from the learned and from the nearest ones, and keep the better of each channel."""
        learned, nearest = (outcome.flip(start, each) for each in (found.rounded[0], start.nearest))
        errors = [outcome.by_channel(start.values(each)) for each in (learned, nearest)]
        shape = [-1 if at == start.nearest.dim else 1 for at in range(start.weight.ndim)]
        integers = torch.where((errors[0] <= errors[1]).reshape(shape), learned.integers, nearest.integers)
        n = start.nearest
        best = QuantizedTensor(integers, n.scales, n.bits, n.quantizer, n.dim)
        error = outcome.total([start.values(best)])
        if error < found.error:
            return LearnedRoundings([best], found.nearest_error, error, found.undecided)
        return found
