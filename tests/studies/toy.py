"""A claim that trains nothing: what the runner does with it takes no time."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from studies import claim as base
from studies.claim import Claim, Run
from studies.results import Store
from studies.runner import Study


@dataclass(frozen=True)
class Result(base.Result):
    accuracy: float
    curve: list[float]


@dataclass(frozen=True, kw_only=True)
class Toy(Claim[Result]):
    """Arm b is better than a by 0.1 at rate 0.1, and by 0.05 at other rates; seeds add the same to both."""

    result = Result
    name: str = "toy"
    text: str = "Arm b is better."
    arms: Sequence[str] = ("a", "b")
    reference: str = "a"
    metric: str = "accuracy"
    chosen_by: str = "accuracy"
    budget: float = 1.0
    epochs: int = 3
    factor: float = math.nan
    duration: float = 0.0
    trained: list[tuple[str, int, float | None]] = field(default_factory=list, compare=False)

    @property
    def settings(self) -> dict[str, Any]:
        return {"epochs": self.epochs, "factor": self.factor}

    def train(self, run: Run) -> Result:
        self.trained.append((run.arm, run.seed, run.rate))
        time.sleep(self.duration)
        gain = {"a": 0.0, "b": 0.1 if run.rate in (None, 0.1) else 0.05}[run.arm]
        run.show(1.0, "done")
        return Result(run.arm, run.seed, run.rate, 0.5 + gain + 0.01 * run.seed, [math.nan, math.inf, run.seed])


def study(folder: Path, seeds: int = 2, **settings: Any) -> Study:
    """Return a study of the claim."""
    return Study(Toy(**settings), range(seeds), Store(folder))
