"""The contract entries of this family."""

from __future__ import annotations

from tests.contract.entries import Technique, conditioner

ENTRIES = [
    conditioner(
        "GradientMonitor",
        compile=True,
        together=True,
        wrong=(
            ({"slow_stats_every": 0}, "slow_stats_every must be at least 1"),
            ({"layer_depth": 0}, "layer_depth must be at least 1"),
            ({"max_layers": -1}, "max_layers must be at least 0"),
        ),
    ),
    Technique("TrainingDoctor", compile=True, together=True, wrong=(({"batches": 0}, "batches must be at least 1"),)),
]
