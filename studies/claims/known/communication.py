"""Two machines on a slow link: seconds until a network has learned, by what the machines send each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from typing_extensions import override

from benchmarks.network import Link, Quality, slow_link, why_unavailable
from benchmarks.several_machines import EPOCHS, GOAL, LEARNERS, LIMIT_S, Learned, learn, reached
from studies import claim as base
from studies.claim import Claim, Paper, Run

ARMS = ("dense", "fp16", "PowerSGD rank 4", "DGC 0.1 %", "DiLoCo H=30")
make_link: Callable[[Quality], AbstractContextManager[Link]] = slow_link


@dataclass(frozen=True)
class Result(base.Result):
    """The result of one training on two machines.

    Args:
        seconds: Wall-clock time until 95 % validation accuracy, without validation; nan if it was not reached.
        megabytes: What the interface of one machine sent in this time.
        accuracy: Accuracy at the end, on all images that were not trained on.
    """

    seconds: float
    megabytes: float
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class OverLink(Claim[Result]):
    """Strategies on two machines, each in a network namespace of its own. Needs Linux and root, and an idle machine.

    Args:
        megabits: Speed of the link, in Mbit/s.
        epochs: Largest number of epochs.
    """

    result = Result
    devices: ClassVar[Sequence[str]] = ("cpu",)
    metric: str = "seconds"
    higher: bool = False
    unit: str = "s"
    chosen_by: str = "seconds"
    megabits: int = 100
    epochs: int = EPOCHS

    @property
    @override
    def known(self) -> list[str]:
        return list(LEARNERS)

    @override
    def check(self) -> None:
        super().check()
        if reason := why_unavailable():
            raise ValueError(f"{self.name} needs a link between two network namespaces: {reason}.")

    @override
    def train(self, run: Run) -> Result:
        """Train on two machines until the goal."""
        rate = {} if run.rate is None else {"rate": run.rate}
        work = partial(learn, LEARNERS[run.arm], seed=run.seed, epochs=self.epochs, **rate)
        with make_link(Quality(float(self.megabits))) as link:
            learned: Learned = link.call(work, LIMIT_S)[0]
        end = reached(learned.epochs)
        found = (end.seconds, end.megabytes) if end else (math.nan, math.nan)
        run.show(1.0, f"{found[0]:6.1f} s to {100 * GOAL:g} %")
        return Result(run.arm, run.seed, run.rate, *found, learned.accuracy)


CLAIMS = (
    OverLink(
        name="slow-link-digits",
        text="Over 100 Mbit/s, two machines learn digits in less time if they compress what they send, or send less often.",
        paper=Paper(
            "`PowerSGDStrategy`, `DGCStrategy`, `DiLoCoStrategy`",
            "communication",
            "Gradients of low rank, sparse gradients, or fewer exchanges train as well, and send far less.",
            "PowerSGD (1905.13727); Deep Gradient Compression (1712.01887); DiLoCo (2311.08105)",
        ),
        arms=ARMS,
        reference="dense",
        rates=(0.02, 0.05, 0.1),
        budget=6,
    ),
)
