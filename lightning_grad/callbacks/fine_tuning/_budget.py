"""Choose layers whose training fits into a memory budget, by measuring what is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_grad.callbacks.fine_tuning._layer_meter import LayerMeter
from lightning_grad.functional import LayerMemory, choose_layers
from lightning_grad.functional.fine_tuning.layer_choice import LayerRule
from lightning_grad.utilities.reporting import format_table

WAY_OUT = "Set layers= to the names of the layers, without budget="
_TRIES = 8
_SHOWN = 24  # layers in the table


@dataclass(frozen=True)
class Budget:
    """The memory that training may take.

    Args:
        meter: Measures the layers.
        measured: What it found, in the order of their calls.
        limit: Bytes.
        display_name: Name of the technique, for errors.
    """

    meter: LayerMeter
    measured: Sequence[LayerMemory]
    limit: float
    display_name: str

    def check(self, names: Sequence[str]) -> list[str]:
        """Return the listed layers.

        Raises:
            ValueError: If they need more.
        """
        if (needed := self.meter.needed(names)) > self.limit:
            raise ValueError(
                f"{self.display_name}: the listed layers need {in_bytes(needed)}, and the budget is "
                f"{in_bytes(self.limit)}. List fewer layers, or set budget={needed} or more."
            )
        return list(names)

    def choose(self, rule: LayerRule, seed: int) -> list[str]:
        """Return the layers that fit. What the rule chooses is measured, and chosen again if it needs more.

        Raises:
            ValueError: If no layer has a gradient, or none fits.
        """
        if not self.measured:
            raise ValueError(
                f"{self.display_name} found no layer with a finite gradient that is not zero in the first batch. {WAY_OUT}."
            )
        aim = self.limit
        for _ in range(_TRIES):
            chosen = [layer.name for layer in choose_layers(self.measured, aim, rule, seed)]
            needed = self.meter.needed(chosen)
            if chosen and needed <= self.limit:
                return chosen
            aim = min(aim - (needed - self.limit), 0.99 * aim)  # the estimate of the rule was too low
        return [self._smallest(rule)]

    def _smallest(self, rule: LayerRule) -> str:
        """Return one layer that fits."""
        cheapest = sorted(self.measured, key=lambda layer: layer.own + layer.path)[:3]
        ends = {"first": self.measured[:1], "last": self.measured[-1:]}
        needs = {layer.name: self.meter.needed([layer.name]) for layer in ends.get(rule, cheapest)}
        smallest = min(needs, key=needs.__getitem__)
        if needs[smallest] <= self.limit:
            return smallest
        raise ValueError(
            f"{self.display_name}: the budget of {in_bytes(self.limit)} is below what the "
            f"{rule if rule in ends else 'smallest'} layer needs: {smallest or 'the module itself'!r} needs "
            f"{in_bytes(needs[smallest])}. Set budget={needs[smallest]} or more, or use smaller batches."
        )

    def table(self, chosen: Sequence[str]) -> str:
        """Return what the layers need, and which of them train, as text."""
        rows = [
            [
                each.name or "(module)",
                f"{each.gain:.3g}",
                in_bytes(each.own),
                in_bytes(each.path),
                "trains" if each.name in chosen else "-",
            ]
            for each in self.measured
        ]
        more = f"\n... and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
        return format_table(rows[:_SHOWN], ["layer", "gain", "own bytes", "path", ""]) + more


def in_bytes(count: float) -> str:
    """Return a number of bytes as text."""
    return f"{count / 1e6:,.3f} MB" if count >= 1e4 else f"{int(count):,} bytes"
