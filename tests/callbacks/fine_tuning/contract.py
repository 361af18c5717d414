"""The contract entries of this family."""

from __future__ import annotations

from tests.contract.entries import Technique

ENTRIES: list[Technique] = []
