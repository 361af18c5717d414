"""What one technique makes of one weight: what the author of a technique writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_grad.core.found_weight import FoundWeight
from lightning_grad.core.weight_chain import Chain


class ViewedWeight:
    """What one technique makes of one weight: derive from it, and write ``value``, ``stored`` or both.

    Args:
        found: The weight.
    """

    def __init__(self, found: FoundWeight) -> None:
        self.found = found
        self.name = found.name
        self.module = found.module
        self.chain = Chain(found)  # of its own, until it joins that of others
        self.is_outdated = False  # by an earlier stage
        self._version = -1

    def value(self, weight: Tensor) -> Tensor:
        """Return what the forward pass of a training step uses, differentiable in ``weight``.

        Args:
            weight: What the stages before this one return; the dense weight if there is none.
        """
        return weight

    def stored(self, weight: Tensor) -> Tensor:
        """Return what validation and checkpoints use: without gradient and without chance, a new tensor or ``weight`` itself.

        Args:
            weight: What the stages before this one store, of the weight that trains or, with weight averaging, of another.
        """
        return weight

    def refresh(self) -> None:
        """Recompute what :meth:`value` takes from the weight: when the fit begins, and after another weight was loaded."""

    def step(self) -> None:
        """Do what is due after each optimizer step that has moved the weight."""
        self.refresh()

    @property
    def signature(self) -> list[str | int]:
        """What must be as before for a resumed run to go on with the state of this weight."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """Return what this weight needs to go on, in types that a checkpoint may hold."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with a saved state, after :meth:`refresh`; not called if nothing was saved."""

    def __str__(self) -> str:
        """Return what is made of the weight, for the table that is printed when the fit begins."""
        return self.found.effect

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that holds the dense weight."""
        return self.found.parameter

    @property
    def dense(self) -> Tensor:
        """The dense weight's values, also while a step computes with others in its place."""
        return self.chain.dense

    @property
    def incoming(self) -> Tensor:
        """What the stages before this one return in training, without gradient: what :meth:`refresh` computes from."""
        return self.chain.before(self)

    @property
    def is_changed(self) -> bool:
        """Whether something other than the optimizer has changed the dense weight since the last refresh."""
        return self.parameter._version != self._version

    @property
    def is_stale(self) -> bool:
        """Whether something other than the optimizer has changed the weight since the last refresh, or an earlier stage."""
        return self.is_outdated or self.is_changed

    def is_renewed(self) -> None:
        """Note that what is shown is that of the weight as it stands, and new to later stages."""
        self.is_outdated, self._version = False, self.parameter._version
        for later in self.chain.after(self):
            later.is_outdated = True

    @property
    def stores(self) -> bool:
        """Whether validation and checkpoints use another weight than the dense one."""
        return type(self).stored is not ViewedWeight.stored
