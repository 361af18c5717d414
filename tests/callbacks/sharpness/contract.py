"""The contract entries of this family."""

from __future__ import annotations

from tests.contract.entries import Technique

_INF = float("inf")

ENTRIES = [
    Technique(
        "SAM",
        wrong=(
            ({"rho": -0.1}, "rho must be at least 0"),
            ({"rho": _INF}, "rho must be finite"),
            ({"rho": {"*": -1.0}}, "rho must be at least 0"),
            ({"rho": {}}, "an empty mapping"),
            ({"eta": 0.0}, "eta must be above 0"),
            ({"every_n_steps": 0}, "every_n_steps must be at least 1"),
        ),
    ),
    Technique("SAM", "adaptive", {"adaptive": True, "every_n_steps": 2, "exclude": ["*.bias"]}, broad=False),
]
