"""Results of other code that still stand: the current code repeats one training of each arm, digit for digit.

With one thread and on the same machine, a training gives the same numbers each time. So if a change of the code changes
nothing in one training of an arm, then it is no reason to train the others again.
"""

from __future__ import annotations

from collections.abc import Sequence

from studies.claim import freeze
from studies.results import Line


def standing(lines: Sequence[Line], code: str) -> set[tuple[str, str]]:
    """Return arms, each with a digest of other code, whose results the current code repeats in each training that both made.

    Args:
        lines: All results with the settings of a claim.
        code: Digest of the current code.
    """
    equal: dict[tuple[str, str], bool] = {}
    current = [line for line in lines if line.origin.code == code]
    for old in lines:
        for new in current:
            if old.origin.code != code and is_same_training(old, new):
                place = (old.arm, old.origin.code)
                equal[place] = equal.get(place, True) and not differences(old, new)
    return {place for place, repeated in equal.items() if repeated}


def is_same_training(old: Line, new: Line) -> bool:
    """Return whether two results are of one training, on the same hardware and with the same versions."""
    return old.key == new.key and old.origin.place == new.origin.place


def differences(old: Line, new: Line) -> list[str]:
    """Return what two results of one training measured differently, apart from durations."""
    names = [name for name in {**old.metrics, **new.metrics} if not name.endswith("seconds")]
    return [
        f"{name} {old.metrics.get(name)} became {new.metrics.get(name)}"
        for name in names
        if freeze({"": old.metrics.get(name)}) != freeze({"": new.metrics.get(name)})
    ]
