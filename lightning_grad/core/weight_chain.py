"""One weight, and the stages through which it is seen: sparse, then quantized, then with noise.

All techniques that have chosen the same weight stand in one :class:`Chain`, in the order of :class:`Stage` and not in that of
the list of callbacks. The chain is the one view of the weight: the module computes with what the last stage returns, the
gradient passes through all of them, and a checkpoint holds what comes out when all of them have stored it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from enum import IntEnum
from itertools import dropwhile, takewhile
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_grad.core.in_place_view import InPlaceView, InPlaceWindow
from lightning_grad.core.weight_view import attach_view

if TYPE_CHECKING:
    from lightning_grad.core.found_weight import FoundWeight
    from lightning_grad.core.viewed_weight import ViewedWeight


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
        self._stages: dict[Stage, ViewedWeight] = {}
        self._shown: set[Stage] = set()
        self._in_place: InPlaceView | None = None
        self._detach: Callable[[], None] = lambda: None
        self._infers = False
        self._inference: Tensor | None = None

    @property
    def stages(self) -> list[Stage]:
        """The stages that techniques have claimed, in order."""
        return list(self._stages)

    @property
    def weights(self) -> list[ViewedWeight]:
        """What the techniques make of the weight, in the order of their stages."""
        return list(self._stages.values())

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
        for weight in self._stages.values():
            dense = weight.value(dense)
        return dense

    def stored(self, dense: Tensor) -> Tensor:
        """Return what inference and checkpoints use."""
        for weight in self._stages.values():
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
        self._stages = dict(sorted({**self._stages, stage: weight}.items()))
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
        self._stages.pop(stage, None)
        for weight in self.weights:
            weight.is_outdated = True
