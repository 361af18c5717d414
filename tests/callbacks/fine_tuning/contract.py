"""The contract entries of this family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.contract.entries import Technique

BODY = {"rank": 2, "alpha": 4.0, "exclude": ["head"]}  # leaves the head to a second instance

_WRONG_BUDGETS: tuple[tuple[Mapping[str, Any], str], ...] = (
    ({"budget": None}, r"needs budget= \(bytes or a share\) or layers= \(names\)"),
    ({"budget": 0}, "share above 0 and at most 1, or an integer number of bytes; got 0"),
    ({"budget": 1.5}, "or an integer number of bytes; got 1.5"),
    ({"rule": "gains"}, "Did you mean 'gain'"),
    ({"state": -1.0}, "state must be at least 0"),
    ({"state": float("inf")}, "state must be finite"),
    ({"seed": -1}, "seed must be at least 0"),
)

_WRONG_RANKS: tuple[tuple[Mapping[str, Any], str], ...] = (
    ({"rank_reduction": 1.0}, "rank_reduction must be at least 0 and below 1"),
    ({"rank_reduction": -0.1}, "rank_reduction must be at least 0 and below 1"),
    ({"min_cut": 1.5}, "min_cut must be from 0 to 1"),
    ({"ranks": "adaptive"}, "ranks"),
)

ENTRIES: list[Technique] = [
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
    Technique("LowRankFinetuning", compile=True, wrong=_WRONG_RANKS),
    Technique(
        "LowRankFinetuning",
        "cut",
        arguments={"rank_reduction": 0.4, "cut_frozen": True, "also_train": ["head", "norm"]},
        neutral={"rank_reduction": 0.0},
        broad=False,
    ),
    Technique("SparseUpdate", compile=True, wrong=_WRONG_BUDGETS),
    Technique(
        "SparseUpdate", "layers", arguments={"layers": ["head", "hidden.bias"]}, neutral={"layers": ["*"]}, broad=False
    ),
    Technique(
        "SaliencyUnlearning",
        compile=True,
        wrong=(
            ({"forget": []}, "forget must hold at least one index"),
            ({"forget": [3, -1]}, "counted from 0; got -1"),
            ({"forget": [0], "keep": 0.0}, "keep must be"),
            ({"forget": [0], "keep": 1.5}, "keep must be"),
            ({"forget": [0], "num_classes": 1}, "num_classes must be at least 2"),
            ({"forget": [0], "seed": -1}, "seed must be at least 0"),
        ),
    ),
]
