"""What a scheme attaches goes when the fit ends, however it ends; what a checkpoint needs stays until the next."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from lightning_grad.strategies import DGCStrategy
from lightning_grad.testing import StopAt, on_ranks
from tests.strategies.fits import train_on_ranks


class Attaches(DGCStrategy):
    """Notes when it attaches to the optimizer, and when it lets go."""

    events: list[str]

    def connect_optimizer(self, optimizer: Any) -> None:
        super().connect_optimizer(optimizer)
        self.events.append("attached")
        self.undo.push(lambda: self.events.append("left"))


class Refuses(Attaches):
    """Refuses the run when it is attached already."""

    def connect_optimizer(self, optimizer: Any) -> None:
        super().connect_optimizer(optimizer)
        assert self.gradient_holds_momentum
        raise ValueError("refused")


def _end(kind: type[Attaches], callbacks: list[Any], fails: bool) -> None:
    strategy = kind(**DGCStrategy.trial)
    strategy.events = []
    if fails:
        with pytest.raises((RuntimeError, ValueError), match=r"stopped on purpose|refused"):
            train_on_ranks(strategy, callbacks)
    else:
        train_on_ranks(strategy, callbacks)
    assert strategy.events == ["attached", "left"]
    assert not strategy.gradient_holds_momentum
    assert not hasattr(strategy, "ranks")


@pytest.mark.parametrize(
    ("kind", "callbacks", "fails"),
    [(Attaches, [], False), (Attaches, [StopAt(3)], True), (Refuses, [], True)],
    ids=["success", "exception", "refused"],
)
def test_what_is_attached_is_left_once(kind: type[Attaches], callbacks: list[Any], fails: bool) -> None:
    on_ranks(1, _end, kind, callbacks, fails)


def _keep() -> None:
    strategy = DGCStrategy(**DGCStrategy.trial)
    train_on_ranks(strategy, max_epochs=1)
    memory, steps = copy.deepcopy(strategy.memory), strategy.ledger.steps
    assert memory
    assert steps
    strategy.begin_fit()
    assert (strategy.memory, strategy.ledger.steps, strategy.step) == ({}, 0, 0)


def test_memory_stays_until_the_next_fit() -> None:
    on_ranks(1, _keep)
