"""The contract entries of this family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.contract.entries import Technique

_INF = float("inf")
_ATTACK_WRONG: tuple[tuple[Mapping[str, Any], str], ...] = (
    ({"epsilon": -0.1}, "epsilon must be at least 0"),
    ({"epsilon": _INF}, "epsilon must be finite"),
    ({"norm": "l1"}, "norm must be"),
    ({"step_size": 0.0}, "step_size must be above 0"),
    ({"bounds": [1.0, 0.0]}, "minimum and the maximum"),
    ({"mean": 0.5}, "mean and std must be set together"),
    ({"mean": 0.5, "std": 0.0}, "std must be above 0"),
    ({"seed": -1}, "seed must be at least 0"),
)

ENTRIES = [
    Technique(
        "AdversarialTraining",
        needs_end={"warmup_fraction": 0.5},
        together=True,
        compile=True,
        wrong=(
            *_ATTACK_WRONG,
            ({"attack": "fgms"}, "Did you mean 'fgsm'"),
            ({"steps": 3}, "steps must be None or 1"),
            ({"attack": "pgd", "steps": 0}, "steps must be at least 1"),
            ({"clean_fraction": 1.0}, "at least 0 and below 1"),
            ({"warmup_fraction": 1.5}, "warmup_fraction must be from 0 to 1"),
            ({"check_every_n_epochs": 0}, "check_every_n_epochs must be at least 1"),
        ),
    ),
    Technique(
        "AdversarialTraining",
        "pgd-l2",
        arguments={
            "epsilon": 0.5,
            "attack": "pgd",
            "steps": 2,
            "norm": "l2",
            "bounds": [-9.0, 9.0],
            "clean_fraction": 0.25,
            "warmup_fraction": 0.2,
            "check_every_n_epochs": None,
        },
        neutral={"epsilon": 0.0},
        broad=False,
    ),
    Technique(
        "AdversarialEvaluation",
        together=True,
        compile=True,
        second={"epsilon": 0.2, "steps": 1, "name": "second"},
        wrong=(
            *_ATTACK_WRONG,
            ({"steps": 0}, "steps must be at least 1"),
            ({"restarts": 0}, "restarts must be at least 1"),
            ({"restarts": 2, "random_start": False}, "would repeat the same attack"),
            ({"every_n_validations": 0}, "every_n_validations must be at least 1"),
            ({"loss_index": -1}, "loss_index must be at least 0"),
        ),
    ),
]
