"""Learning rates that are multiplied during one step and restored before other code reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

Factor = float | Tensor
_LEDGER = "_lightning_grad_held_rates"  # attribute of an optimizer while its rates are multiplied


class HeldRates:
    """One technique's factors on the learning rates of an optimizer.

    Several techniques may multiply the rates of one optimizer: their factors multiply, and each
    technique removes its own, in any order. If a scheduler or the user sets a rate meanwhile, that
    is the new base rate: :meth:`follow` multiplies it, and :meth:`give_back` restores it.

    Apply factors during one step only, because everything that reads the optimizer sees the
    multiplied rates: a scheduler that computes a rate from the last one would start from a
    multiplied rate.

    Args:
        optimizer: Optimizer that has the rates.

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
        """Multiply the rates, replacing an earlier factor of this object.

        Args:
            factor: One number for all parameter groups, or one for each. A tensor avoids a host
                sync; the optimizer must then support tensors as learning rates.

        Raises:
            ValueError: If the number of factors differs from the number of groups.
        """
        if isinstance(factor, float) and factor == 1.0:
            self.give_back()
            return
        groups = self._optimizer.param_groups
        factors = list(factor) if isinstance(factor, (list, tuple)) else [factor] * len(groups)
        if len(factors) != len(groups):
            raise ValueError(
                f"factor must be one number or one for each of the optimizer's {len(groups)} parameter groups; got "
                f"{len(factors)} factors."
            )
        ledger = self._optimizer.__dict__.setdefault(_LEDGER, _Ledger())
        ledger.factors[id(self)] = factors
        ledger.settle(groups)

    def follow(self) -> None:
        """Multiply rates that were set since :meth:`multiply`."""
        ledger, groups = self._ledger, self._optimizer.param_groups
        if ledger is not None and any(g["lr"] is not held for g, (_, held) in zip(groups, ledger.rates, strict=False)):
            ledger.settle(groups)

    def give_back(self) -> None:
        """Remove this object's factors. It may be called more than once."""
        ledger = self._ledger
        if ledger is not None and ledger.factors.pop(id(self), None) is not None:
            ledger.settle(self._optimizer.param_groups)
            if not ledger.factors:
                del self._optimizer.__dict__[_LEDGER]


class _Ledger:
    """All factors on the rates of one optimizer, and for each group the rate without and with them."""

    def __init__(self) -> None:
        self.factors: dict[int, list[Factor]] = {}
        self.rates: list[tuple[Any, Any]] = []

    def settle(self, groups: Sequence[dict[str, Any]]) -> None:
        known = self.rates or [(group["lr"], group["lr"]) for group in groups]
        self.rates = []
        for number, (group, (before, held)) in enumerate(zip(groups, known, strict=False)):
            # If the group holds another object than the one stored here, the rate was set since.
            rate = before if group["lr"] is held else group["lr"]
            product = rate
            for factors in self.factors.values():
                product = product * factors[number] if number < len(factors) else product
            group["lr"] = product
            self.rates.append((rate, product))
