"""The evidence for each claim, read from the files of results; nothing is trained.

A row is a claim on some data and a device. Its verdict follows from the results that the files have, by the rule of
``verdict.py``, and each of its numbers is that of some lines: those of :attr:`Row.lines`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning_grad.cli.catalog import techniques
from studies.claim import Claim, freeze
from studies.plan import CHOICE_SEED, Plan
from studies.repeats import standing
from studies.results import Line, Store
from studies.sources import digest_of
from studies.verdict import CONTRADICTED, HOLDS, NOT_SHOWN, PART, UNDECIDED, Comparison, compare, judge

NOT_RUN = "not run"
ORDER = (HOLDS, PART, CONTRADICTED, NOT_SHOWN, UNDECIDED, NOT_RUN)
# The family of claims without a paper, where their module does not have its name.
FAMILY_OF = {"label_errors": "data_pruning"}


@dataclass(frozen=True)
class Row:
    """What the files know about a claim.

    Args:
        claim: The claim, with the data and the device of the results.
        found: All lines with its settings: of each training, the last one.
        history: All lines with its settings.
        about: If given, only the comparisons of arms with this technique count, if there are any.
    """

    claim: Claim[Any]
    found: Sequence[Line]
    history: Sequence[Line] = ()
    about: type[Any] | None = None

    @cached_property
    def plan(self) -> Plan | None:
        """The plan of all seeds that the files have."""
        seeds = sorted({line.seed for line in self.found} - {CHOICE_SEED})
        return Plan(self.claim, seeds, self.found, self.found[-1].origin) if self.found else None

    @cached_property
    def lines(self) -> list[Line]:
        """The lines at the chosen rates, on which the row rests."""
        return self.plan.reported if self.plan else []

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """The comparisons of the claim."""
        found = compare(self.claim, [line.result(self.claim) for line in self.lines])
        return [each for each in found if self.about in self.classes_of(each.arm)] or found

    def classes_of(self, arm: str) -> set[type[Any]]:
        """Return the classes of the callbacks of an arm, if the claim has a table of its arms."""
        table: Mapping[str, Any] = getattr(self.claim, "table", {})
        return set(table[arm].classes) if arm in table else set()

    @property
    def has_differences(self) -> bool:
        """Whether a seed has both arms of a comparison."""
        return any(each.differences for each in self.comparisons)

    @cached_property
    def word(self) -> str:
        """The verdict."""
        return judge(self.comparisons) if self.found else NOT_RUN

    @property
    def group(self) -> str:
        """The verdict without its numbers, one of :data:`ORDER`."""
        return UNDECIDED if self.word.startswith(UNDECIDED) else self.word

    @property
    def is_decided(self) -> bool:
        """Whether all seeds are there."""
        return self.group not in (UNDECIDED, NOT_RUN)

    @property
    def data(self) -> str:
        """The name of the data."""
        return data_of(self.claim)

    @property
    def is_on_known_data(self) -> bool:
        """Whether the data is not the default, which needs no download."""
        return self.claim.data is not None

    @property
    def device(self) -> str:
        """The name of the GPU, or ``"CPU"``."""
        return next((gpu for line in self.lines if (gpu := line.origin.hardware["gpu"])), "CPU")

    @property
    def family(self) -> str:
        """The name of the family."""
        stem = type(self.claim).__module__.rpartition(".")[2]
        return self.claim.paper.family if self.claim.paper else FAMILY_OF.get(stem, stem)

    @cached_property
    def techniques(self) -> list[type[Any]]:
        """The exported techniques that the claim names, and those of its arms that their references do not share."""
        words = re.findall(r"\w+", self.claim.paper.technique) if self.claim.paper else self.claim.about
        pairs = self.claim.comparisons()
        used = {arm: self.classes_of(arm) for pair in pairs for arm in pair}
        shared = set.intersection(*used.values()) if used else set()
        own = {each for arm, _ in pairs for each in used[arm]} - shared
        known = [each for members in techniques().values() for each in members]
        return [each for each in known if each in own or each.__name__ in words]

    @cached_property
    def other(self) -> list[Line]:
        """The lines of other code than that of this repository."""
        return [line for line in self.lines if line.origin.code != self.code]

    @cached_property
    def old(self) -> list[Line]:
        """The lines of other code whose results the current code was not seen to repeat."""
        repeated = standing(self.history, self.code) if self.other else set()
        return [line for line in self.other if (line.arm, line.origin.code) not in repeated]

    @cached_property
    def code(self) -> str:
        """The digest of the current code."""
        return digest_of(self.claim) if self.lines else ""

    @cached_property
    def weakest(self) -> Comparison:
        """The comparison that supports the verdict least, among those that decide it."""
        deciding = HOLDS if self.group == PART else self.group
        chosen = [each for each in self.comparisons if each.word == deciding] or self.comparisons
        return (max if self.group == NOT_SHOWN else min)(chosen, key=strength)

    @property
    def extremes(self) -> list[Comparison]:
        """The worst and the best comparison, or the only one; a mean that does not exist is the worst."""
        ranked = sorted(self.comparisons, key=lambda each: -math.inf if math.isnan(each.mean) else each.mean)
        return ranked if len(ranked) < 2 else [ranked[0], ranked[-1]]

    @property
    def edges(self) -> list[str]:
        """The arms whose best rate is at an end of the grid."""
        return self.plan.edges if self.plan else []

    @property
    def command(self) -> str:
        """The command that runs the claim."""
        data = " --data FOLDER" if self.is_on_known_data else ""
        device = f" --device {self.claim.device}" if self.claim.device != "cpu" else ""
        return f"python -m studies --only {self.claim.name}{data}{device}"


def strength(comparison: Comparison) -> float:
    """Return the distance of the mean from the margin, in halves of the interval; of the seeds in which no training failed.

    Example:
        >>> sure, unsure = (Comparison("b", "a", values, needed=2) for values in ([2.0, 2.1], [-0.9, 1.0]))
        >>> strength(sure) > 1 > strength(unsure)
        True
    """
    finite = [value for value in comparison.differences if math.isfinite(value)]
    low, high = replace(comparison, differences=finite).interval
    middle = sum(finite) / len(finite) if finite else math.inf
    if high == low or not finite:
        return math.inf
    return 2 * abs(middle - comparison.margin) / (high - low)


def data_of(claim: Claim[Any]) -> str:
    """Return the name of the data of a claim."""
    named, folder = claim.settings.get("data"), Path("folder")
    if claim.data is None:
        return named or claim.default_data
    if replace(claim, data=folder).settings["data"] != folder.name:  # the claim has its own name of the data
        return str(named)
    return "CIFAR-10" if "CIFAR-10" in claim.reads else f"the text {named}"


def rows_of(claims: Iterable[Claim[Any]], store: Store) -> list[Row]:
    """Return the rows of claims in the order of the page: by verdict, known data before the default, then by family."""
    rows = [row for claim in claims for row in _rows(claim, store)]
    places = {row.claim.name: place for place, row in enumerate(rows)}
    return sorted(
        rows, key=lambda row: (ORDER.index(row.group), not row.is_on_known_data, row.family, places[row.claim.name])
    )


def known_first(rows: Iterable[Row]) -> list[Row]:
    """Return the decided rows, those on known data first."""
    return sorted((row for row in rows if row.is_decided), key=lambda row: not row.is_on_known_data)


def rows_about(technique: type[Any], rows: Iterable[Row]) -> list[Row]:
    """Return the rows of a technique, each judged by the comparisons of this technique alone."""
    return [replace(row, about=technique) for row in rows if technique in row.techniques]


def _rows(claim: Claim[Any], store: Store) -> Iterator[Row]:
    """Yield a row for each data and device of which there are results, or one without results."""
    lines = store.all(claim)
    names = dict.fromkeys(str(line.settings["data"]) for line in lines if line.settings.get("data"))
    devices = dict.fromkeys(line.origin.device for line in lines)
    kinds = {
        (freeze(each.settings), device): replace(each, device=device)
        for each in (replace(claim, data=None), *(replace(claim, data=Path(name)) for name in names))
        for device in devices
    }
    rows = [Row(each, found, store.history(each)) for each in kinds.values() if (found := store.read(each))]
    yield from rows or [Row(replace(claim, data=None), [])]


def telling(rows: Sequence[Row], number: int) -> list[Row]:
    """Return the most telling decided rows, good and bad ones, in the order of the page.

    A row tells more on known data than on the default, and the further its weakest comparison is from the margin. The best
    row of each family comes first. Of the chosen rows, two are contradicted, or not shown, if there are as many; of these,
    the best of each technique comes first.

    Args:
        rows: The rows of the page.
        number: How many to return, at least three.
    """
    decided = [row for row in rows if row.is_decided]
    ranked = sorted(decided, key=lambda row: (not row.is_on_known_data, -strength(row.weakest)))
    good = varied([row for row in ranked if row.group in (HOLDS, PART)], lambda row: row.family)
    bad = [row for row in ranked if row.group not in (HOLDS, PART)]
    bad = varied(sorted(bad, key=lambda row: row.group != CONTRADICTED), lambda row: row.techniques)
    most = max(number - len(bad), min(len(good), number - 2))
    chosen = [*good[:most], *bad[: number - len(good[:most])]]
    return [row for row in rows if any(row is each for each in chosen)]


def varied(rows: Sequence[Row], kind: Callable[[Row], Any]) -> list[Row]:
    """Return rows in their order, but the first of each kind before the others."""
    kinds = [kind(row) for row in rows]
    repeated = [own in kinds[:place] for place, own in enumerate(kinds)]
    return [row for wanted in (False, True) for row, again in zip(rows, repeated, strict=True) if again is wanted]
