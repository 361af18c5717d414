"""The contract entries of this family."""

from __future__ import annotations

from tests.contract.entries import conditioner

ENTRIES = [
    conditioner(
        "GradientMonitor",
        compile=True,
        together=True,
        wrong=(
            ({"slow_stats_every": 0}, "slow_stats_every must be at least 1"),
            ({"depth": 0}, "depth must be at least 1"),
            ({"top": -1}, "top must be at least 0"),
        ),
    ),
]
