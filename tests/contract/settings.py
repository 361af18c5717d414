"""The entries of all callbacks, collected from the folders of their families."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from lightning_grad import callbacks
from lightning_grad.core.roles import ROLES
from tests.contract.entries import Technique, collect

__all__ = ["BROAD", "CANONICAL", "CHOOSING", "DIFFERENT", "TECHNIQUES", "Technique", "build_together"]

_FAMILIES = sorted(path.parent.name for path in Path(__file__).parents[1].glob("callbacks/*/contract.py"))

TECHNIQUES: list[Technique]
CANONICAL: list[Technique]
TECHNIQUES, CANONICAL = collect(
    [importlib.import_module(f"tests.callbacks.{family}.contract") for family in _FAMILIES], callbacks
)
DIFFERENT: list[Technique] = [
    entry
    for entry in TECHNIQUES
    if any(entry.name == first.name and entry.works_with != first.works_with for first in CANONICAL)
]
"""Settings that work with other things than the first of their technique."""
CHOOSING: list[Technique] = [
    next((entry for entry in TECHNIQUES if entry.name == first.name and entry.chooses), first)
    for first in CANONICAL
    if "include" in first.build().settings
    and first.name not in ("GhostBatchNorm", "DataPruning")  # which chooses layers, or only where its score compares
]
"""A setting of each technique that chooses parameters by their names."""
BROAD: list[Technique] = [technique for technique in TECHNIQUES if technique.broad]


def build_together() -> list[Any]:
    """Build one technique of each kind, as a user might list them."""
    built = [technique.build() for technique in TECHNIQUES if technique.together]
    return sorted(built, key=lambda callback: ROLES.index(getattr(callback, "role", ROLES[0])))
