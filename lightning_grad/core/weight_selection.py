"""The weights that one technique has chosen in a fit, and chooses again after the first batch."""

from __future__ import annotations

from typing import Any, Generic

import lightning.pytorch as pl
from torch import Tensor
from torch.optim import Optimizer

from lightning_grad.core.module_chains import ModuleChains
from lightning_grad.core.network_ends import Ends
from lightning_grad.core.weight_chain import Chain, Stage
from lightning_grad.core.weight_choice import W, Wanted, WeightChoice, choose_weights
from lightning_grad.utilities.checks import owned_ids


class Selection(Generic[W]):
    """Chooses weights, and lets them join the chains of the module.

    It is kept after an exception, for the checkpoints that are saved then. A copy belongs to no fit, and is None.

    Args:
        pl_module: The module.
        chains: Its chains.
        stage: Where the technique stands in them.
        wanted: What it looks for.
        ends: Finds the layers that it leaves alone by default.
    """

    def __init__(
        self, pl_module: pl.LightningModule, chains: ModuleChains, stage: Stage, wanted: Wanted[W], ends: Ends
    ) -> None:
        self._pl_module = pl_module
        self._chains = chains
        self._stage = stage
        self._wanted = wanted
        self.ends = ends
        self.weights: list[W] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()

    def choose(self) -> WeightChoice[W]:
        """Choose weights, by the ends as they are known; nothing is shown yet."""
        return choose_weights(self._pl_module, self._wanted, self.ends)

    def show(self, choice: WeightChoice[W]) -> None:
        """Show the module the chosen weights."""
        self.weights = choice.chosen
        for weight in self.weights:
            self._chains.join(self._stage, weight)

    def hide(self) -> None:
        """Take all views and hooks away; the weights stay known."""
        self.ends.stop()
        for weight in self.weights:
            weight.chain.hide(self._stage)

    def learn_ends(self) -> tuple[list[W], list[W]]:
        """Choose again once the first batch has shown which layers it reaches first and last.

        Returns:
            tuple: Weights that are shown from now on, and those that are dense from now on.
        """
        if not self.ends.learn():
            return [], []
        before = {weight.name: weight for weight in self.weights}
        chosen = [before.get(w.name, w) for w in self.choose().chosen if w.name in before or self._is_free(w)]
        if not chosen:
            return [], []  # nothing but ends: better the layers of the start than none
        kept = {weight.name for weight in chosen}
        dense = [weight for weight in self.weights if weight.name not in kept]
        added = [weight for weight in chosen if weight.name not in before]
        for weight in dense:
            self._chains.drop(self._stage, weight)
        for weight in added:
            self._chains.join(self._stage, weight)
        self.weights = chosen
        return added, dense

    def _is_free(self, weight: W) -> bool:
        return not self._chains.is_taken(weight.found, self._stage)

    def owned_by(self, optimizer: Optimizer) -> list[W]:
        """Return the weights that an optimizer moves."""
        owned = owned_ids(optimizer)
        return [weight for weight in self.weights if id(weight.parameter) in owned]

    def views(self) -> dict[str, tuple[Tensor, Chain]]:
        """Return dense weight and chain by every key of ``state_dict``, where this technique's stage is the first.

        Whichever techniques stand in a chain, one of them puts its residual into a checkpoint. A shared parameter has
        several keys.
        """
        first = {id(w.parameter): w.chain for w in self.weights if w.chain.stages[0] is self._stage}
        named = self._pl_module.named_parameters(remove_duplicate=False)
        return {name: (first[id(p)].dense, first[id(p)]) for name, p in named if id(p) in first}


def _nothing() -> None:
    return None
