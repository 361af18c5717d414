"""The chains of one module in one fit, whichever techniques ask for them.

What must happen once and in order, however many techniques act on a module's weights, happens here: in-place weights are
uncovered before an optimizer moves them and covered again when all techniques have followed it; techniques follow in the order
of their stages; and at the end of the fit the chains are baked once, when every technique has said what it leaves behind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

import lightning.pytorch as pl
from torch.optim import Optimizer

from lightning_grad.core.undo import UndoList
from lightning_grad.core.views.weight_chain import Chain, Stage, ViewedWeight
from lightning_grad.core.views.weight_view import InPlaceWindow, has_view

if TYPE_CHECKING:
    from lightning_grad.core.views.weight_choice import FoundWeight
    from lightning_grad.core.weights import WeightCallback

_CHAINS: WeakKeyDictionary[pl.LightningModule, ModuleChains] = WeakKeyDictionary()


class ModuleChains:
    """Chains by weight, and the techniques that stand in them.

    Args:
        trainer: The trainer, with its optimizers.
        pl_module: Its module.
    """

    def __init__(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.trainer = trainer
        self._pl_module = pl_module
        self._techniques: list[WeightCallback[Any]] = []
        self._chains: dict[int, Chain] = {}
        self._window: InPlaceWindow | None = None
        self._watched: WeakSet[Optimizer] = WeakSet()
        self._undo = UndoList()
        self._inside = 0
        self._is_baked = False

    def enter(self, technique: WeightCallback[Any]) -> Callable[[], None]:
        """Make a technique follow the optimizers from now on.

        Returns:
            Callable: Ends that; the last one to leave takes everything away.
        """
        self._watch_optimizers()
        self._techniques = sorted([*self._techniques, technique], key=lambda other: other.stage)
        self._inside += 1
        return self._leave

    def _watch_optimizers(self) -> None:
        """Follow the trainer's optimizers, also one that has taken another's place."""
        for optimizer in self.trainer.optimizers:
            if optimizer not in self._watched:
                self._watched.add(optimizer)
                self._undo.push(optimizer.register_step_pre_hook(self._before_step).remove)
                self._undo.push(optimizer.register_step_post_hook(self._after_step).remove)

    def _leave(self) -> None:
        self._inside -= 1
        if not self._inside:
            self._undo.run()
            _CHAINS.pop(self._pl_module, None)

    def is_taken(self, found: FoundWeight, stage: Stage) -> bool:
        """Return whether a weight is shown through a view already that leaves no place for a stage."""
        chain = self._chains.get(id(found.parameter))
        return has_view(found.module, found.attribute) if chain is None else stage in chain.stages

    def join(self, stage: Stage, weight: ViewedWeight) -> None:
        """Add a stage to the chain of a weight."""
        chain = self._chains.setdefault(id(weight.parameter), Chain(weight.found))
        chain.join(stage, weight, self._opened)

    def drop(self, stage: Stage, weight: ViewedWeight) -> None:
        """Remove a stage from the chain of a weight."""
        weight.chain.drop(stage)
        if not weight.chain.stages:
            del self._chains[id(weight.parameter)]

    def _opened(self) -> InPlaceWindow:
        if self._window is None:
            self._window = InPlaceWindow(self._pl_module, [])
            self._undo.push(self._window.remove)
        return self._window

    def close_window(self) -> None:
        """Put dense weights back where a step computes with others in their place."""
        if self._window is not None:
            self._window.close()

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Uncover the dense weights for a step that runs no closure; one that does calls on_before_optimizer_step."""
        if not any(callable(value) for value in (*args, kwargs.get("closure"))):
            self.close_window()

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        for technique in self._techniques:
            technique.after_step(self.trainer, optimizer)
        if self._window is not None:
            self._window.reopen()

    def begin_batch(self) -> None:
        """Bring weights up to date that something other than the optimizers has changed, and follow new optimizers."""
        self._watch_optimizers()
        for technique in self._techniques:
            technique.renew_stale()

    def renew_after(self, technique: WeightCallback[Any]) -> None:
        """Bring later stages up to date, because this one starts after them."""
        for other in self._techniques:
            if other.stage > technique.stage:
                other.renew_stale()

    def bake(self) -> None:
        """Make what the techniques leave behind the parameters' own, once for all of them."""
        if self._is_baked:
            return
        self._is_baked = True
        self.close_window()
        lasting = [weight for technique in self._techniques for weight in technique.settle(self.trainer)]
        for chain in self._chains.values():
            chain.bake(lasting)


def chains_of(trainer: pl.Trainer, pl_module: pl.LightningModule) -> ModuleChains:
    """Return the chains of a module in the present fit, the same for every technique."""
    chains = _CHAINS.get(pl_module)
    if chains is None or chains.trainer is not trainer:
        chains = _CHAINS[pl_module] = ModuleChains(trainer, pl_module)
    return chains
