"""One weight, and the stages through which it is seen: sparse, then quantized, then with noise.

All techniques that have chosen the same weight stand in one :class:`Chain`, in the order of :class:`Stage` and not in that of
the list of callbacks. The chain is the one view of the weight: the module computes with what the last stage returns, the
gradient passes through all of them, and a checkpoint holds what comes out when all of them have stored it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from itertools import dropwhile, takewhile
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_grad.core.undo import UndoList
from lightning_grad.core.views.weight_view import InPlaceView, InPlaceWindow, attach_view, has_view

if TYPE_CHECKING:
    from lightning_grad.core.views.weight_choice import FoundWeight
    from lightning_grad.core.weights import WeightCallback


class Stage(IntEnum):
    """What a technique does to a weight, in the order in which it is done."""

    SPARSITY = 1
    QUANTIZATION = 2
    NOISE = 3


class Chain:
    """The one view of a weight: all its stages, in order.

    Args:
        found: The weight.
    """

    def __init__(self, found: FoundWeight) -> None:
        self.found = found
        self.name = found.name
        self.stages: dict[Stage, ViewedWeight] = {}
        self._shown: set[Stage] = set()
        self._in_place: InPlaceView | None = None
        self._detach: Callable[[], None] = lambda: None
        self._infers = False
        self._inference: Tensor | None = None

    @property
    def weights(self) -> list[ViewedWeight]:
        """What the techniques make of the weight, in the order of their stages."""
        return list(self.stages.values())

    @property
    def dense(self) -> Tensor:
        """The dense weight's values, wherever they are now."""
        return self.found.parameter.detach() if self._in_place is None else self._in_place.dense

    def before(self, weight: ViewedWeight) -> Tensor:
        """Return what the stages before that of a weight return in training."""
        value = self.dense
        with torch.no_grad():
            for other in takewhile(lambda other: other is not weight, self.weights):
                value = other.value(value)
        return value

    def after(self, weight: ViewedWeight) -> list[ViewedWeight]:
        """Return what later stages make of a weight."""
        behind = dropwhile(lambda other: other is not weight, self.weights)
        return list(behind)[1:]

    def value(self, dense: Tensor) -> Tensor:
        """Return what the forward pass uses."""
        if self._infers:
            return dense if self._inference is None else self._inference
        for weight in self.stages.values():
            dense = weight.value(dense)
        return dense

    def stored(self, dense: Tensor) -> Tensor:
        """Return what inference and checkpoints use."""
        for weight in self.stages.values():
            dense = weight.stored(dense)
        return dense

    def enter_inference(self) -> None:
        """Show what a checkpoint would hold, whichever weights are in the parameter now."""
        if self._infers:
            return
        dense = self.dense
        stored = self.stored(dense)
        self._infers, self._inference = True, None if stored is dense else stored

    def leave_inference(self) -> None:
        """Show the training weights again."""
        self._infers, self._inference = False, None

    @torch.no_grad()
    def bake(self, lasting: Sequence[ViewedWeight]) -> None:
        """Make what some of the stages store the parameter's own."""
        dense = value = self.found.parameter.detach()
        for weight in self.weights:
            value = weight.stored(value) if any(weight is other for other in lasting) else value
        if value is not dense:
            self.found.parameter.copy_(value)

    def join(self, stage: Stage, weight: ViewedWeight, window: Callable[[], InPlaceWindow]) -> None:
        """Add a stage, and show the module what comes out."""
        self.stages = dict(sorted({**self.stages, stage: weight}.items()))
        weight.chain = self
        found = self.found
        if not self._shown and found.in_place:
            self._in_place, opened = InPlaceView(found.module, found.attribute, self, found.twins), window()
            opened.add(self._in_place)
            self._detach = functools.partial(opened.discard, self._in_place)
        elif not self._shown:
            self._detach = attach_view(found.module, found.attribute, self)
        self._shown.add(stage)

    def hide(self, stage: Stage) -> None:
        """Take the view away when the last stage is hidden; what all store stays known, for checkpoints of an exception."""
        self._shown.discard(stage)
        if not self._shown:
            self._detach()
            self._detach, self._in_place = lambda: None, None

    def drop(self, stage: Stage) -> None:
        """Remove a stage."""
        self.hide(stage)
        self.stages.pop(stage, None)
        for weight in self.weights:
            weight.is_outdated = True


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


_CHAINS: WeakKeyDictionary[pl.LightningModule, ModuleChains] = WeakKeyDictionary()


class ModuleChains:
    """The chains of one module in one fit by weight, and the techniques that stand in them, whichever ask for them.

    What must happen once and in order, however many techniques act on a module's weights, happens here: in-place weights are
    uncovered before an optimizer moves them and covered again when all techniques have followed it; techniques follow in the
    order of their stages; and at the end of the fit the chains are baked once, when every technique has said what it leaves.

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
