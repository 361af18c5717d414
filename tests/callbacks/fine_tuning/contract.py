"""The contract entries of this family."""

from __future__ import annotations

from tests.contract.entries import Technique

ENTRIES: list[Technique] = [
    Technique(
        "SaliencyUnlearning",
        compile=True,
        wrong=(
            ({"forget": []}, "forget must hold at least one index"),
            ({"forget": [3, -1]}, "counted from 0; got -1"),
            ({"forget": "3"}, "forget must be"),
            ({"keep": 0.0}, "keep must be"),
            ({"keep": 1.5}, "keep must be"),
            ({"num_classes": 1}, "num_classes must be at least 2"),
            ({"seed": -1}, "seed must be at least 0"),
        ),
    ),
]
