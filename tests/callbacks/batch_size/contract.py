"""The contract entries of this family."""

from __future__ import annotations

from lightning_grad.callbacks import GhostBatchNorm
from tests.contract.entries import Technique

_TRIAL = GhostBatchNorm.trial

ENTRIES = [
    Technique("GhostBatchNorm", wrong=(({"size": 1}, "size must be at least 2"),), compile=True),
]
