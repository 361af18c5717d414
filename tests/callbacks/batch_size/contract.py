"""The contract entries of this family."""

from __future__ import annotations

from tests.contract.entries import Technique

ENTRIES = [
    Technique(
        "BatchSizeLRScaling",
        arguments={"base_batch_size": 4, "batch_size": 8},  # some loaders of the suite do not say it
        wrong=(
            ({"base_batch_size": 0}, "base_batch_size must be at least 1"),
            ({"base_batch_size": 8, "batch_size": 0}, "batch_size must be at least 1"),
            ({"base_batch_size": 8, "rule": "root"}, "rule must be 'auto', 'linear' or 'sqrt'"),
        ),
    ),
    Technique("GhostBatchNorm", wrong=(({"size": 1}, "size must be at least 2"),), compile=True),
]
