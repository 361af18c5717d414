"""Learning rates that are multiplied for a while, and given back in time for schedulers, monitors and checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

Factor = float | Tensor
_LEDGER = "_lightning_grad_held_rates"  # of an optimizer, while its rates are held


class HeldRates:
    """One technique's hold on the learning rates of an optimizer.

    Several techniques may hold the rates of one optimizer: their factors multiply, and each gives back its own, in any order.
    A rate that a scheduler or the user sets in the meantime is the rate from then on: :meth:`follow` multiplies it, and
    :meth:`give_back` leaves it.

    Rates are seen while they are held by all that look into the optimizer, so hold them for the length of a step only: a
    scheduler that computes a rate from the last one would take the multiplied one for it.

    Args:
        optimizer: Whose rates.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
        >>> one, other = HeldRates(optimizer), HeldRates(optimizer)
        >>> one.multiply(0.5)
        >>> other.multiply(0.1)
        >>> optimizer.param_groups[0]["lr"]
        0.025
        >>> one.give_back()
        >>> optimizer.param_groups[0]["lr"]
        0.05
        >>> other.give_back()
        >>> optimizer.param_groups[0]["lr"]
        0.5
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer

    @property
    def _ledger(self) -> _Ledger | None:
        return self._optimizer.__dict__.get(_LEDGER)

    def multiply(self, factor: Factor | Sequence[Factor]) -> None:
        """Hold the rates at so many times what they are without this hold.

        Args:
            factor: One number for all parameter groups, or one for each. A tensor keeps the host from waiting for it; the
                optimizer must then bear a learning rate that is a tensor.

        Raises:
            ValueError: If there are fewer or more factors than groups.
        """
        if isinstance(factor, float) and factor == 1.0:
            self.give_back()
            return
        groups = self._optimizer.param_groups
        factors = list(factor) if isinstance(factor, (list, tuple)) else [factor] * len(groups)
        if len(factors) != len(groups):
            raise ValueError(
                f"The optimizer has {len(groups)} parameter groups, and rates are to be multiplied by {len(factors)} "
                "factors. Give one factor for all groups, or one for each."
            )
        ledger = self._optimizer.__dict__.setdefault(_LEDGER, _Ledger())
        ledger.factors[id(self)] = factors
        ledger.settle(groups)

    def follow(self) -> None:
        """Hold rates that were set since, too."""
        ledger, groups = self._ledger, self._optimizer.param_groups
        if ledger is not None and any(g["lr"] is not held for g, (_, held) in zip(groups, ledger.rates, strict=False)):
            ledger.settle(groups)

    def give_back(self) -> None:
        """Release the rates; more than one call does no harm."""
        ledger = self._ledger
        if ledger is not None and ledger.factors.pop(id(self), None) is not None:
            ledger.settle(self._optimizer.param_groups)
            if not ledger.factors:
                del self._optimizer.__dict__[_LEDGER]


class _Ledger:
    """The factors of all who hold the rates of one optimizer, and for each group the rate without and with them."""

    def __init__(self) -> None:
        self.factors: dict[int, list[Factor]] = {}
        self.rates: list[tuple[Any, Any]] = []

    def settle(self, groups: Sequence[dict[str, Any]]) -> None:
        known = self.rates or [(group["lr"], group["lr"]) for group in groups]
        self.rates = []
        for number, (group, (before, held)) in enumerate(zip(groups, known, strict=False)):
            # Another object than the one put there is a rate that was set since.
            rate = before if group["lr"] is held else group["lr"]
            product = rate
            for factors in self.factors.values():
                product = product * factors[number] if number < len(factors) else product
            group["lr"] = product
            self.rates.append((rate, product))
