"""The entries of all strategies."""

from __future__ import annotations

from lightning_grad import strategies
from tests.contract.entries import Scheme, collect
from tests.strategies import contract

__all__ = ["CANONICAL", "SCHEMES", "Scheme"]

SCHEMES: list[Scheme]
CANONICAL: list[Scheme]
SCHEMES, CANONICAL = collect([contract], strategies)
