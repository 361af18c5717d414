"""The contract entries of this family."""

from __future__ import annotations

from tests.contract.entries import Technique

_INF = float("inf")

ENTRIES = [
    Technique(
        "TrAct",
        wrong=(({"damping": 0.0}, "damping must be above 0"), ({"damping": _INF}, "damping must be finite")),
    ),
    Technique(
        "ZerothOrder",
        wrong=(
            ({"epsilon": 0.0}, "epsilon must be above 0"),
            ({"epsilon": _INF}, "epsilon must be finite"),
            ({"max_derivative": -1.0}, "max_derivative must be above 0"),
            ({"seed": -1}, "seed must be at least 0"),
        ),
    ),
]
