"""What is known about each technique, and the rule by which a ratio is shown."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median
from typing import Any

from lightning_grad.cli.check.outcome import Outcome
from lightning_grad.cli.check.short_trainer import EPOCHS
from lightning_grad.cli.check.watch import PHASES

ROUNDS = 5
"""Rounds that a ratio needs."""

_MANY = 8  # rounds
_LEAST = 0.1  # a smaller difference of the step times is not shown
_NOISE = 2 * 2**20  # bytes; a process takes memory in larger pieces than tensors need
_NOT_FINITE = "Its weights became non-finite; without it they stay finite."
_DATA = {"elsewhere": "training data", "validation": "validation"}
_STEPS = {"elsewhere": "steps an epoch", "validation": "validation steps an epoch"}
_REHEARSAL = 2  # fewer steps an epoch are a rehearsal, or the rounding of a share of the data


@dataclass(frozen=True)
class Extra:
    """Calls of the module's steps outside of training batches that only a technique makes, in a run of some length.

    Args:
        calls: Number of these calls in the whole run.
        batches: Batches of a training epoch, or of all validations.
    """

    calls: int
    batches: int


@dataclass
class Row:
    """A technique and what its trials showed.

    Args:
        technique: Class of the technique.
        outcome: Outcome of the latest trial.
        rounds: Seconds of the fastest step with the technique and of the fastest step without it, for each round.
            Other processes can only slow a step down.
        extra: Calls between epochs by phase, for each length of the epochs that was tried.
        memory: Bytes of peak memory beyond a run without the technique, and how much such runs differ; ``None`` if
            not measured.
    """

    technique: type[Any]
    outcome: Outcome = field(default_factory=lambda: Outcome("not tried"))
    rounds: list[tuple[float, float]] = field(default_factory=list)
    extra: dict[str, list[Extra]] = field(default_factory=dict)
    memory: tuple[int, int] | None = None

    @property
    def is_open(self) -> bool:
        """Whether a further trial can show something new."""
        return self.outcome.status in ("runs", "not tried")

    def add(self, outcome: Outcome, bare: Outcome) -> None:
        """Add the outcome of a round, and that of a run without the technique in the same round."""
        if outcome.status == "runs" and bare.is_finite and not outcome.is_finite:
            outcome = Outcome("FAILED", [_NOT_FINITE])
        self.outcome = outcome
        if outcome.status != "runs":
            return
        if outcome.seconds and bare.seconds:
            self.rounds.append((min(outcome.seconds), min(bare.seconds)))
        if not self.extra:
            self.compare_calls(outcome, bare)
        if outcome.peak is not None and bare.peak is not None:
            self.memory = (outcome.peak - bare.peak, 0)

    def compare_calls(self, outcome: Outcome, bare: Outcome) -> None:
        """Count the calls between epochs that only the technique makes."""
        lengths = {"elsewhere": bare.batches // EPOCHS, "validation": bare.calls.get("validation", 0)}
        for phase in PHASES:
            calls = outcome.calls.get(phase, 0) - bare.calls.get(phase, 0)
            self.extra.setdefault(phase, []).append(Extra(calls, lengths[phase]))

    @property
    def ratios(self) -> list[float]:
        """The ratios of the rounds, sorted. The two of a round are measured shortly after each other."""
        return sorted(ours / bare for ours, bare in self.rounds)

    @property
    def ratio(self) -> float | None:
        """The median of the ratios; ``None`` before there are enough of them."""
        return median(self.ratios) if len(self.rounds) >= ROUNDS else None

    @property
    def spread(self) -> float:
        """The largest difference of two ratios, without the two extreme ones if there are at least eight."""
        ratios = self.ratios[1:-1] if len(self.rounds) >= _MANY else self.ratios
        return ratios[-1] - ratios[0]

    @property
    def step_time(self) -> str:
        """The ratio in words: a number only if it differs from 1 by more than the rounds differ from each other.

        Example:
            >>> Row(object, rounds=[(1.9, 1.0), (2.0, 1.0), (2.1, 1.0), (4.4, 2.0), (1.8, 1.0)]).step_time
            '2.0'
            >>> Row(object, rounds=[(1.0, 1.0), (1.4, 1.0), (1.3, 1.0), (1.2, 1.0), (1.3, 1.0)]).step_time
            'about 1'
        """
        if self.ratio is None:
            return "-"
        return f"{self.ratio:.1f}" if self._differs and not self.is_unclear else "about 1"

    @property
    def is_unclear(self) -> bool:
        """Whether the ratio differs from 1, and the rounds differ from each other even more."""
        return self._differs and self.ratio is not None and self.spread >= abs(self.ratio - 1.0)

    @property
    def _differs(self) -> bool:
        return self.ratio is not None and abs(self.ratio - 1.0) > _LEAST

    @property
    def has_passes(self) -> bool:
        """Whether the technique runs the module between epochs."""
        return any(extra.calls > 0 for found in self.extra.values() for extra in found)

    @property
    def passes(self) -> str:
        """What the technique runs between epochs: passes through the data, and steps that do not grow with the data.

        Example:
            >>> Row(object, extra={"elsewhere": [Extra(4, 4), Extra(8, 8)]}).passes
            '1 x training data'
            >>> Row(object, extra={"elsewhere": [Extra(39, 4), Extra(39, 8)]}).passes
            '13 steps an epoch'
        """
        found = [words for phase, extra in self.extra.items() for words in _words_of(phase, extra)]
        return ", ".join(found) or "-"

    @property
    def memory_in_words(self) -> str:
        """The additional peak memory, if it is more than runs without the technique differ."""
        if self.memory is None:
            return "-"
        extra, noise = self.memory
        return f"{extra / 2**20:+,.0f} MB" if abs(extra) > max(noise, _NOISE) else "about 0"


def _words_of(phase: str, extra: list[Extra]) -> list[str]:
    first, last = min(extra, key=_length), max(extra, key=_length)
    if last.calls <= 0:
        return []
    further = last.batches - first.batches
    share = (last.calls - first.calls) / further if further else _likely_share(phase, last)
    fixed = (first.calls - share * first.batches) / EPOCHS
    shown = [f"{share:.2g} x {_DATA[phase]}"] if share > 0 else []
    return shown + ([f"{fixed:.3g} {_STEPS[phase]}"] if fixed >= _REHEARSAL or not shown else [])


def _likely_share(phase: str, only: Extra) -> float:
    """Return the share of the data if it is too short for two lengths: what is not a number of steps in each epoch."""
    is_pass = phase == "validation" or only.calls < EPOCHS
    if not is_pass or not only.batches:
        return 0.0
    return only.calls // only.batches or only.calls / only.batches  # whole passes; the rest is a rehearsal


def _length(extra: Extra) -> int:
    return extra.batches
