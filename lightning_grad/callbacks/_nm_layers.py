"""The sparse weights of one fit: chosen, shown to the module through views, and chosen again after the first batch.

Used by :class:`lightning_grad.callbacks.NMSparsity` alone.
"""

from __future__ import annotations

from collections.abc import Callable

import lightning.pytorch as pl
from torch import Tensor
from torch.optim import Optimizer

from lightning_grad.callbacks._nm_choice import Choice, is_shown
from lightning_grad.callbacks._nm_ends import Ends
from lightning_grad.callbacks._nm_weight import SparseWeight
from lightning_grad.core.weight_view import InPlaceView, InPlaceWindow, attach_view
from lightning_grad.utilities.checks import owned_ids


class SparseLayers:
    """Attaches views to the chosen weights, and takes them away.

    Args:
        pl_module: The module.
        ends: Finds the layers that stay dense by default.
        choose: Chooses the weights, by the ends as they are known.
        straight_through: Whether gradients pass to pruned weights as they are.
    """

    def __init__(
        self, pl_module: pl.LightningModule, ends: Ends, choose: Callable[[], Choice], straight_through: bool
    ) -> None:
        self._pl_module = pl_module
        self._choose = choose
        self._straight_through = straight_through
        self._window: InPlaceWindow | None = None
        self._detach: dict[str, Callable[[], None]] = {}
        self.ends = ends
        self.weights: list[SparseWeight] = []

    def attach(self, choice: Choice) -> None:
        """Show the module the chosen weights through their views."""
        self.weights = choice.chosen
        for weight in self.weights:
            self._show(weight)
        self._open()

    def _show(self, weight: SparseWeight) -> None:
        weight.straight_through = self._straight_through
        if not weight.in_place:
            self._detach[weight.name] = attach_view(weight.module, weight.attribute, weight)

    def _open(self) -> None:
        for weight in self.weights:
            if weight.in_place:
                weight.exposed = InPlaceView(weight.module, weight.attribute, weight, weight.others)
        in_place = [weight.exposed for weight in self.weights if weight.exposed is not None]
        if in_place:
            self._window = InPlaceWindow(self._pl_module, in_place)

    def _shut(self) -> None:
        if self._window is not None:
            self._window.remove()
            self._window = None

    def detach(self) -> None:
        """Take all views and hooks away; the weights stay known."""
        self.ends.stop()
        self._shut()
        while self._detach:
            self._detach.popitem()[1]()

    def close_window(self) -> None:
        """Put dense weights back where a step computes with others in their place."""
        if self._window is not None:
            self._window.close()

    def reopen_window(self) -> None:
        """Go on with the rest of a manual step after an optimizer has stepped."""
        if self._window is not None:
            self._window.reopen()

    def learn_ends(self) -> tuple[list[SparseWeight], list[SparseWeight]]:
        """Choose again once the first batch has shown which layers it reaches first and last.

        Returns:
            tuple: Weights that are sparse from now on, and those that are dense from now on.
        """
        if not self.ends.learn():
            return [], []
        before = {weight.name: weight for weight in self.weights}
        chosen = [before.get(w.name, w) for w in self._choose().chosen if w.name in before or not is_shown(w)]
        if not chosen:
            return [], []  # nothing but ends: better the layers of the start than none
        self._shut()
        kept = {weight.name for weight in chosen}
        dense = [weight for weight in self.weights if weight.name not in kept]
        for weight in dense:
            self._detach.pop(weight.name, lambda: None)()
        self.weights = chosen
        added = [weight for weight in chosen if weight.name not in before]
        for weight in added:
            self._show(weight)
        self._open()
        return added, dense

    def owned_by(self, optimizer: Optimizer) -> list[SparseWeight]:
        """Return the weights that an optimizer moves."""
        owned = owned_ids(optimizer)
        return [weight for weight in self.weights if id(weight.parameter) in owned]

    def views(self) -> dict[str, tuple[Tensor, SparseWeight]]:
        """Return dense weight and view by every key of ``state_dict``; a shared parameter has several."""
        by_identity = {id(weight.parameter): weight for weight in self.weights}
        named = self._pl_module.named_parameters(remove_duplicate=False)
        return {name: (by_identity[id(p)].dense, by_identity[id(p)]) for name, p in named if id(p) in by_identity}
