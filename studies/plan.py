"""The plan of a claim: which trainings are missing, at which rates, and how long they take."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from studies.claim import Claim, Run
from studies.results import Line, Origin

CHOICE_SEED = 1000  # rates are chosen on it, so it is never reported


class Plan:
    """What the results so far leave to do.

    Args:
        claim: The claim.
        seeds: Seeds to report.
        lines: Results so far, with the settings of the claim.
        origin: Origin of results of this process.
        pace: Measured seconds of this start, relative to the expected ones.
    """

    def __init__(
        self, claim: Claim[Any], seeds: Sequence[int], lines: Sequence[Line], origin: Origin, pace: float = 1.0
    ) -> None:
        self.claim = claim
        self.seeds = seeds
        self.lines = {line.key: line for line in lines}
        self.origin = origin
        self.pace = pace

    @cached_property
    def rates(self) -> dict[str, float | None]:
        """The rate of each arm that has one: the best of the grid by validation on the seed of the choice."""
        grid = self.claim.rates
        if len(grid) < 2:
            return dict.fromkeys(self.claim.arms, grid[0] if grid else None)
        scores = {arm: self.scores(arm) for arm in self.claim.arms}
        return {arm: max(grid, key=own.__getitem__) for arm, own in scores.items() if len(own) == len(set(grid))}

    @property
    def edges(self) -> list[str]:
        """The arms whose best rate is at an end of a grid of more than two, so a better one may be outside."""
        grid = self.claim.rates
        return [arm for arm, rate in self.rates.items() if len(grid) > 2 and rate in (min(grid), max(grid))]

    def scores(self, arm: str) -> dict[float, float]:
        """Return the validation of an arm by rate, on the seed of the choice."""
        found = {rate: self.lines.get(Run(arm, CHOICE_SEED, rate)) for rate in self.claim.rates}
        return {rate: self.claim.score(line.result(self.claim)) for rate, line in found.items() if line}

    @property
    def choices(self) -> list[Run]:
        """The trainings that choose the rates, each rate with all arms."""
        grid = self.claim.rates if len(self.claim.rates) > 1 else ()
        return [Run(arm, CHOICE_SEED, rate) for rate in grid for arm in self.claim.arms]

    @cached_property
    def ready(self) -> list[Run]:
        """The missing trainings that can start: first choices of rates, then seed by seed, so no arm is ahead."""
        reported = [
            Run(arm, seed, self.rates[arm]) for seed in self.seeds for arm in self.claim.arms if arm in self.rates
        ]
        return [run for run in [*self.choices, *reported] if run not in self.lines]

    @property
    def waiting(self) -> list[Run]:
        """The missing trainings whose rate is not chosen yet; they name no rate."""
        return [Run(arm, seed) for seed in self.seeds for arm in self.claim.arms if arm not in self.rates]

    @property
    def missing(self) -> int:
        """The number of missing trainings."""
        return len(self.ready) + len(self.waiting)

    @property
    def total(self) -> int:
        """The number of all trainings."""
        return len(self.choices) + len(self.seeds) * len(self.claim.arms)

    @property
    def reported(self) -> list[Line]:
        """The results at the chosen rates, in the order of seeds and arms."""
        wanted = [Run(arm, seed, rate) for seed in self.seeds for arm, rate in self.rates.items()]
        return [self.lines[run] for run in wanted if run in self.lines]

    def seconds(self, run: Run) -> float:
        """Return the expected duration of a training: of the same arm, else of any arm, else what the claim declares."""
        return self.pace * statistics.median(self._measured.get(run.arm) or self._measured[""])

    @cached_property
    def _measured(self) -> dict[str, list[float]]:
        """Durations by arm, under "" of all arms; on this hardware if there are any."""
        lines = list(self.lines.values())
        here = [line for line in lines if line.origin.hardware == self.origin.hardware] or lines
        by_arm: dict[str, list[float]] = {"": [line.seconds for line in here]}
        for line in here:
            by_arm.setdefault(line.arm, []).append(line.seconds)
        declared = 60 * self.claim.budget / (len(self.choices) + self.claim.seeds * len(self.claim.arms))
        return by_arm if here else {"": [declared]}

    @property
    def left(self) -> float:
        """The expected seconds of all missing trainings."""
        return sum(map(self.seconds, [*self.ready, *self.waiting]))

    def __str__(self) -> str:
        if not self.missing:
            return f"{self.claim.name}: complete, {len(self.reported)} results"
        basis = f"by {len(self.lines)} measured trainings" if self.lines else "as declared, nothing is measured yet"
        choice = sum(run.seed == CHOICE_SEED for run in self.ready)
        first = f", {choice} of them to choose rates" if choice else ""
        return f"{self.claim.name}: {self.missing} trainings{first}, {minutes(self.left)} {basis}"


def describe(run: Run) -> str:
    """Return the name of a training in the progress display.

    Example:
        >>> describe(Run("zclip", 3)), describe(Run("dense", CHOICE_SEED, 0.1))
        ('zclip seed 3', 'dense at rate 0.1')
    """
    return f"{run.arm} at rate {run.rate:g}" if run.seed == CHOICE_SEED else f"{run.arm} seed {run.seed}"


def minutes(seconds: float) -> str:
    """Format a duration.

    Example:
        >>> minutes(20), minutes(200), minutes(9000)
        ('20 s', '3 min', '2.5 h')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
