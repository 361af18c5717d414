"""The claim about two machines on a slow link, with a link that runs nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.network import Quality
from benchmarks.several_machines import LEARNERS, Epoch, Learned, learn
from studies.claim import Run
from studies.claims.known import communication

(CLAIM,) = communication.CLAIMS


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replace the link by one that notes what it should run, and answers with two epochs."""
    noted: list[Any] = []

    class Link:
        def call(self, work: Any, timeout_s: float) -> list[Learned]:
            noted.append(work)
            return [Learned([Epoch(0.5, 1.0, 2.0), Epoch(0.96, 3.0, 4.0)], 0.9)] * 2

    @contextmanager
    def made(quality: Quality) -> Iterator[Link]:
        noted.append(quality)
        yield Link()

    monkeypatch.setattr(communication, "make_link", made)
    return noted


def test_a_training_is_that_of_the_arm_over_the_link(calls: list[Any]) -> None:
    result = replace(CLAIM, megabits=20).train(Run("DGC 0.1 %", 3, 0.02))
    quality, work = calls
    assert quality == Quality(20.0)
    assert work.func is learn
    assert (work.args, work.keywords) == ((LEARNERS["DGC 0.1 %"],), {"seed": 3, "epochs": CLAIM.epochs, "rate": 0.02})
    assert (result.seconds, result.megabytes, result.accuracy) == (3.0, 4.0, 0.9)


def test_a_training_that_does_not_reach_the_goal_is_worse_than_any_that_does(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = CLAIM.train(Run("dense", 0, 0.05))
    monkeypatch.setattr(communication, "reached", lambda epochs: None)
    missed = CLAIM.train(Run("DGC 0.1 %", 0, 0.05))
    assert CLAIM.score(missed) == -math.inf
    assert CLAIM.difference({"dense": reached, "DGC 0.1 %": missed}, "DGC 0.1 %", "dense") == -math.inf


def test_without_a_link_the_claim_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(communication, "why_unavailable", lambda: "it needs root")
    with pytest.raises(ValueError, match=r"slow-link-digits needs a link .*: it needs root"):
        CLAIM.check()
