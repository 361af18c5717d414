"""Results of other code that still stand: the current code repeats one training of each arm, digit for digit.

With one thread and on the same machine, a training gives the same numbers each time. So if a change of the code changes
nothing in one training of an arm, then it is no reason to train the others again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations

from studies.claim import Run, freeze
from studies.results import Line


def standing(lines: Sequence[Line], code: str) -> set[tuple[str, str]]:
    """Return arms, each with a digest of other code, whose results the current code repeats in each training that both made.

    Args:
        lines: All results with the settings of a claim.
        code: Digest of the current code.
    """
    equal: dict[tuple[str, str], bool] = {}
    for old, new in pairs(lines):
        if new.origin.code == code != old.origin.code:
            place = (old.arm, old.origin.code)
            equal[place] = equal.get(place, True) and not differences(old, new)
    return {place for place, repeated in equal.items() if repeated}


def pairs(lines: Iterable[Line]) -> Iterator[tuple[Line, Line]]:
    """Yield both orders of any two results of one training, on the same hardware and with the same versions."""
    by_training: dict[tuple[Run, str], list[Line]] = {}
    for line in lines:
        by_training.setdefault((line.key, line.origin.same[1]), []).append(line)
    for same in by_training.values():
        for one, other in combinations(same, 2):
            yield one, other
            yield other, one


def differences(old: Line, new: Line) -> list[str]:
    """Return what two results of one training measured differently, apart from durations."""
    names = [name for name in {**old.metrics, **new.metrics} if not name.endswith("seconds")]
    return [
        f"{name} {old.metrics.get(name)} became {new.metrics.get(name)}"
        for name in names
        if freeze({"": old.metrics.get(name)}) != freeze({"": new.metrics.get(name)})
    ]
