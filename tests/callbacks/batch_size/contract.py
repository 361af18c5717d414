"""The contract entries of this family."""

from __future__ import annotations

from tests.contract.entries import Technique

ENTRIES = [
    Technique(
        "AdaptiveBatchSize",
        wrong=(
            ({"eta": 0.0}, "eta must be above 0"),
            ({"eta": float("inf")}, "eta must be finite"),
            ({"max_accumulation": 0}, "max_accumulation must be at least 1"),
            ({"start": 0}, "start must be at least 1"),
            ({"start": 3, "max_accumulation": 2}, "start must be at most max_accumulation=2"),
            ({"every_n_steps": 0}, "every_n_steps must be at least 1"),
            ({"estimator": "biased"}, "estimator must be 'unbiased' or 'paper'"),
        ),
    ),
    Technique(
        "BatchSizeLRScaling",
        wrong=(
            ({"base_batch_size": 0}, "base_batch_size must be at least 1"),
            ({"base_batch_size": 8, "batch_size": 0}, "batch_size must be at least 1"),
            ({"base_batch_size": 8, "rule": "root"}, "rule must be 'auto', 'linear' or 'sqrt'"),
        ),
    ),
    Technique("GhostBatchNorm", wrong=(({"size": 1}, "size must be at least 2"),), compile=True),
]
