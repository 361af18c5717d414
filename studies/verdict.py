"""Verdicts: differences of the same seed, their interval, and what follows for a claim."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from studies.claim import Claim, Result

LEVEL = 0.95
HOLDS, PART, NOT_SHOWN, CONTRADICTED = "holds", "holds in part", "not shown", "contradicted"
UNDECIDED = "undecided"  # seeds are missing


@dataclass(frozen=True)
class Comparison:
    """An arm against another one, over the seeds that both have.

    Args:
        arm: The arm.
        reference: The other arm.
        differences: By how much the arm is better, for each seed; infinite where one of both diverged.
        margin: The claim holds if the difference is above this.
        needed: Number of seeds that a verdict needs.
    """

    arm: str
    reference: str
    differences: Sequence[float]
    margin: float = 0.0
    needed: int = 5

    @property
    def mean(self) -> float:
        """The mean difference; infinite or nan if a training diverged."""
        return sum(self.differences) / len(self.differences) if self.differences else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The interval of the mean difference by Student's t, or the range if a training diverged."""
        if len(self.differences) < 2:
            return -math.inf, math.inf
        if not all(map(math.isfinite, self.differences)):
            return min(self.differences), max(self.differences)
        half = quantile(len(self.differences)) * standard_error(self.differences)
        return self.mean - half, self.mean + half

    @property
    def word(self) -> str:
        """The verdict."""
        seeds = len(self.differences)
        if seeds < self.needed:
            return f"{UNDECIDED} ({seeds} of {self.needed} seeds)"
        low, high = self.interval
        return HOLDS if low > self.margin else CONTRADICTED if high < self.margin else NOT_SHOWN


def quantile(seeds: int) -> float:
    """Return the factor of the standard error of a mean.

    Example:
        >>> round(quantile(5), 3)
        2.776
    """
    from scipy.special import stdtrit

    return float(stdtrit(seeds - 1, (1 + LEVEL) / 2))


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of a mean of at least two values.

    Example:
        >>> standard_error([1.0, 3.0])
        1.0
    """
    return statistics.stdev(values) / math.sqrt(len(values))


def compare(claim: Claim[Any], results: Sequence[Result]) -> list[Comparison]:
    """Compare the arms of a claim, paired by seed."""
    by_seed: dict[int, dict[str, Any]] = {}
    for result in results:
        by_seed.setdefault(result.seed, {})[result.arm] = result
    compared = []
    for arm, reference in claim.comparisons():
        found = [difference(claim, own, arm, reference) for _, own in sorted(by_seed.items())]
        differences = [value for value in found if value is not None]
        margin = claim.margins.get(arm, claim.margin)
        compared.append(Comparison(arm, reference, differences, margin, claim.seeds))
    return compared


def difference(claim: Claim[Any], results: Mapping[str, Any], arm: str, reference: str) -> float | None:
    """Return the difference of one seed, or None if an arm is not there yet or both diverged."""
    try:
        value = claim.difference(results, arm, reference)
    except KeyError:
        return None
    return None if math.isnan(value) else value


def judge(comparisons: Sequence[Comparison]) -> str:
    """Return the verdict of a claim from those of its comparisons.

    It holds if all comparisons do, and in part if some do. If none does, it is contradicted if a comparison is, and else not
    shown. While seeds are missing, it is undecided.
    """
    words = [comparison.word for comparison in comparisons]
    undecided = [word for word in words if word.startswith(UNDECIDED)]
    if undecided or not words:
        return min(undecided, default=f"{UNDECIDED} (nothing is compared)")
    if HOLDS in words:
        return HOLDS if len(set(words)) == 1 else PART
    return CONTRADICTED if CONTRADICTED in words else NOT_SHOWN
