"""The contract entries of this family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.contract.entries import Technique, conditioner

_PROBE_WRONG: tuple[tuple[Mapping[str, Any], str], ...] = (
    ({"samples": 0}, "samples must be at least 1"),
    ({"every_n_epochs": 0}, "every_n_epochs must be at least 1"),
    ({"every_n_epochs": 1, "every_n_steps": 5}, "Set either every_n_epochs or every_n_steps"),
)

ENTRIES = [
    conditioner(
        "GradientMonitor",
        compile=True,
        together=True,
        wrong=(
            ({"slow_stats_every": 0}, "slow_stats_every must be at least 1"),
            ({"layer_depth": 0}, "layer_depth must be at least 1"),
            ({"max_layers": -1}, "max_layers must be at least 0"),
            ({"spike_factor": 1.0}, "spike_factor must be above 1"),
        ),
    ),
    Technique(
        "GradCAMLogger",
        compile=True,
        second={"method": "smooth_gradcam++", "samples": 2, "every_n_epochs": 2, "name": "second"},
        wrong=(
            *_PROBE_WRONG,
            ({"method": "grad-cam"}, "Did you mean 'gradcam'"),
            ({"target": "labels"}, "target must be"),
            ({"noisy_copies": 0}, "noisy_copies must be at least 1"),
            ({"noise_std": 0.0}, "noise_std must be above 0"),
            ({"loss_index": -1}, "loss_index must be at least 0"),
        ),
    ),
    Technique(
        "HessianSpectrum",
        compile=True,
        second={"samples": 4, "probes": 0, "density": False, "lanczos_steps": 3, "name": "second"},
        wrong=(
            *_PROBE_WRONG,
            ({"num_eigenvalues": 0}, "num_eigenvalues must be at least 1"),
            ({"probes": -1}, "probes must be at least 0"),
            ({"lanczos_steps": 1}, "lanczos_steps must be at least 2"),
            ({"num_eigenvalues": 5, "lanczos_steps": 4}, "lanczos_steps must be at least num_eigenvalues=5; got 4"),
            ({"seed": -1}, "seed must be at least 0"),
        ),
    ),
    Technique(
        "GradientDiversity",
        compile=True,
        second={"samples": 4, "dim": 128, "every_n_epochs": 2, "name": "second"},
        wrong=(
            *_PROBE_WRONG,
            ({"dim": 100}, "dim must be a positive multiple of 64; got 100"),
            ({"loss_index": -1}, "loss_index must be at least 0"),
            ({"seed": -1}, "seed must be at least 0"),
        ),
    ),
    Technique(
        "InputGradientLogger",
        compile=True,
        second={"samples": 2, "target": "label", "every_n_epochs": 2, "name": "second"},
        wrong=(
            *_PROBE_WRONG,
            ({"target": "labels"}, "target must be"),
            ({"loss_index": -1}, "loss_index must be at least 0"),
        ),
    ),
    Technique("TrainingDoctor", compile=True, together=True, wrong=(({"batches": 0}, "batches must be at least 1"),)),
]
