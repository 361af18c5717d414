"""The chain of stages of one weight: sparse, then quantized, then noisy.

All techniques that choose the same weight form one :class:`Chain`, in the order of :class:`Stage`,
not of the list of callbacks. The chain is the only view of the weight: the module computes with the
output of the last stage, gradients pass through all stages, and a checkpoint holds the output of
all stages' ``stored``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Set
from enum import IntEnum
from itertools import takewhile
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_grad.core.undo import UndoList
from lightning_grad.core.views.weight_view import InPlaceView, InPlaceWindow, attach_view, has_view
from lightning_grad.functional.gradients.shards import as_used, is_fully_sharded, reshard

if TYPE_CHECKING:
    from lightning_grad.core.views.weight_choice import FoundWeight
    from lightning_grad.core.weights import WeightCallback


class Stage(IntEnum):
    """The kinds of techniques that act on weights, in the order in which they act."""

    SPARSITY = 1
    QUANTIZATION = 2
    NOISE = 3


class Chain:
    """The only view of a weight: all its stages, in order.

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
        """The views of all techniques, in the order of their stages."""
        return list(self.stages.values())

    @property
    def dense(self) -> Tensor:
        """Values of the dense weight, even while a step computes with other values in the parameter."""
        return self.found.parameter.detach() if self._in_place is None else self._in_place.dense

    def before(self, weight: ViewedWeight) -> Tensor:
        """Return the training output of the stages before that of a view."""
        value = self.dense
        if len(self.stages) < 2:
            return value
        for other in takewhile(lambda other: other is not weight, self.stages.values()):
            with torch.no_grad():
                value = other.value(value)
        return value

    def after(self, weight: ViewedWeight) -> list[ViewedWeight]:
        """Return the views of later stages."""
        if len(self.stages) < 2:
            return []
        weights = self.weights
        return weights[weights.index(weight) + 1 :] if weight in weights else []

    def value(self, dense: Tensor) -> Tensor:
        """Return the weight for the forward pass."""
        if dense is self.found.sharded and is_fully_sharded(self.found.module):
            return dense  # FSDP2 looks for its own parameter; no layer computes with shards
        if self._infers:
            return dense if self._inference is None else as_used(self._inference, dense)
        for weight in self.stages.values():
            dense = weight.value(dense)
        return dense

    def stored(self, dense: Tensor) -> Tensor:
        """Return the weight for inference and checkpoints."""
        for weight in self.stages.values():
            dense = weight.stored(dense)
        return dense

    def enter_inference(self) -> None:
        """Compute with the stored weight from now on, derived from whatever the parameter holds now."""
        if self._infers:
            return
        dense = self.dense
        stored = self.stored(dense)
        self._infers, self._inference = True, None if stored is dense else stored

    def leave_inference(self) -> None:
        """Compute with the training weight again."""
        self._infers, self._inference = False, None

    @torch.no_grad()
    def bake(self, lasting: Set[ViewedWeight]) -> None:
        """Write the stored values of the given stages into the parameter."""
        dense = value = self.found.parameter.detach()
        for weight in self.weights:
            value = weight.stored(value) if weight in lasting else value
        if value is not dense:
            self.found.parameter.copy_(value)

    def join(self, stage: Stage, weight: ViewedWeight, window: Callable[[], InPlaceWindow]) -> None:
        """Add a stage, and attach the chain to the module if it is the first."""
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
        """Hide a stage. The last one detaches the chain, which still stores, for checkpoints after an exception."""
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
    """One technique's view of one weight: derive from it, and define ``value``, ``stored`` or both.

    Args:
        found: The weight.
    """

    def __init__(self, found: FoundWeight) -> None:
        self.found = found
        self.name = found.name
        self.module = found.module
        self.chain = Chain(found)  # its own, until it joins the chain of the module
        self.is_outdated = False  # whether an earlier stage changed
        self._version = -1

    def value(self, weight: Tensor) -> Tensor:
        """Return the weight for the forward pass of a training step, differentiable with respect to ``weight``.

        Args:
            weight: Output of the earlier stages; the dense weight for the first stage.
        """
        return weight

    def stored(self, weight: Tensor) -> Tensor:
        """Return the weight for validation and checkpoints: a new tensor or ``weight`` itself.

        It must be deterministic and have no gradient.

        Args:
            weight: Stored output of the earlier stages, for the trained weight or, with weight
                averaging, the average.
        """
        return weight

    def refresh(self) -> None:
        """Recompute what :meth:`value` derives from the weight. Called when the fit begins and after a load."""

    def step(self) -> None:
        """Update the view after each optimizer step on the weight."""
        self.refresh()

    @property
    def makes_zeros(self) -> bool:
        """Whether this view sets entries to zero that later stages have to keep."""
        return False

    @property
    def passes_gradient(self) -> bool:
        """Whether the gradient of the weight is that of the view's value, unchanged."""
        return False

    def why_not_after(self, earlier: ViewedWeight) -> str:
        """Return why this view cannot act on the output of an earlier stage, and what to do; empty if it can."""
        return ""

    @property
    def signature(self) -> list[str | int]:
        """Values that must be unchanged for a resumed run to use the saved state of this weight."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """Return the state of this view, in types that a checkpoint may hold."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved state, after :meth:`refresh`. Not called if nothing was saved."""

    def __str__(self) -> str:
        """Return a description of the view, for the table that is printed when the fit begins."""
        return self.found.effect

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that holds the dense weight."""
        return self.found.parameter

    @property
    def dense(self) -> Tensor:
        """Values of the dense weight, even while a step computes with other values in the parameter."""
        return self.chain.dense

    @property
    def incoming(self) -> Tensor:
        """Training output of the earlier stages, without gradient; the input of :meth:`refresh`."""
        return self.chain.before(self)

    @property
    def is_changed(self) -> bool:
        """Whether anything but the optimizer changed the dense weight since the last refresh."""
        return self.parameter._version != self._version

    @property
    def is_stale(self) -> bool:
        """Whether an earlier stage, or anything but the optimizer, changed the weight since the last refresh."""
        return self.is_outdated or self.is_changed

    def is_renewed(self) -> None:
        """Mark this view as up to date and the views of later stages as outdated."""
        self.is_outdated, self._version = False, self.parameter._version
        for later in self.chain.after(self):
            later.is_outdated = True

    @property
    def stores(self) -> bool:
        """Whether validation and checkpoints use a weight other than the dense one."""
        return type(self).stored is not ViewedWeight.stored


_CHAINS: WeakKeyDictionary[pl.LightningModule, ModuleChains] = WeakKeyDictionary()


class ModuleChains:
    """The chains of one module in one fit, and the techniques that use them.

    It does what must happen once and in order for all techniques: it restores in-place weights
    before an optimizer step and writes the views again after all techniques have updated them; it
    calls the techniques in the order of their stages; and at the end of the fit it writes the
    stored weights into the parameters once, after asking every technique for its weights.

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
        """Call a technique after each optimizer step from now on.

        Returns:
            Callable: Removes the technique; the last one to leave removes all hooks.
        """
        self._watch_optimizers()
        self._techniques = sorted([*self._techniques, technique], key=lambda other: other.stage)
        self._inside += 1
        return self._leave

    def _watch_optimizers(self) -> None:
        """Hook into the trainer's optimizers, including any that replaced another."""
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
        """Return True if a weight already has a view that cannot take this stage."""
        chain = self._chains.get(id(found.parameter))
        return has_view(found.module, found.attribute) if chain is None else stage in chain.stages

    def why_not(self, stage: Stage, weight: ViewedWeight) -> str:
        """Return why a view cannot join the stages that its weight already has, and what to do; empty if it can."""
        chain = self._chains.get(id(weight.parameter))
        for other_stage, other in chain.stages.items() if chain else ():
            later, earlier = (weight, other) if other_stage < stage else (other, weight)
            if reason := later.why_not_after(earlier):
                return reason
        return ""

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
        """Restore the dense weights of in-place views."""
        if self._window is not None:
            self._window.close()

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Restore the dense weights before a step without a closure; with one, on_before_optimizer_step does so."""
        if not any(callable(value) for value in (*args, kwargs.get("closure"))):
            self.close_window()

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        for technique in self._techniques:
            technique.after_update(optimizer)
        for technique in self._techniques:
            technique.after_step(self.trainer, optimizer)
        if self._window is not None:
            self._window.reopen()

    def begin_batch(self) -> None:
        """Update views of weights that anything but the optimizers changed, and hook into new optimizers."""
        self._watch_optimizers()
        for technique in self._techniques:
            technique.renew_stale()

    def renew_after(self, technique: WeightCallback[Any]) -> None:
        """Update later stages whose techniques started before this one."""
        for other in self._techniques:
            if other.stage > technique.stage:
                other.renew_stale()

    def bake(self) -> None:
        """Write the stored weights of all techniques into the parameters, once."""
        if self._is_baked:
            return
        self._is_baked = True
        self.close_window()
        reshard(
            self._pl_module
        )  # after a validation, some layers compute with whole weights that would stay as they are
        lasting = {weight for technique in self._techniques for weight in technique.settle(self.trainer)}
        for chain in self._chains.values():
            chain.bake(lasting)


def chains_of(trainer: pl.Trainer, pl_module: pl.LightningModule) -> ModuleChains:
    """Return the chains of a module in the current fit; all techniques share them."""
    chains = _CHAINS.get(pl_module)
    if chains is None or chains.trainer is not trainer:
        chains = _CHAINS[pl_module] = ModuleChains(trainer, pl_module)
    return chains
