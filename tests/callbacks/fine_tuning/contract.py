"""The contract entries of this family."""

from __future__ import annotations

from tests.contract.entries import Technique

BODY = {"rank": 2, "alpha": 4.0, "exclude": ["head"]}  # leaves the head to a second instance

ENTRIES = [
    Technique(
        "LoRA",
        arguments=BODY,
        second={**BODY, "exclude": None, "include": ["head"], "name": "head"},
        wrong=(
            ({"rank": -1}, "rank must be at least 0"),
            ({"alpha": 0.0}, "alpha must be above 0"),
            ({"alpha": float("inf")}, "alpha must be finite"),
            ({"init": "gradient"}, "init must be 'default' or 'ga'"),
            ({"init_batches": 0}, "init_batches must be at least 1"),
            ({"seed": -1}, "seed must be at least 0"),
        ),
        compile=True,
    ),
    Technique("LoRA", "ga", arguments={**BODY, "init": "ga", "init_batches": 2}),
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
