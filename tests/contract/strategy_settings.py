"""The entries of all strategies."""

from __future__ import annotations

from lightning_grad import strategies
from tests.contract.entries import Scheme, collect
from tests.strategies import contract

__all__ = ["BROAD", "CANONICAL", "COMPRESSING", "SCHEMES", "Scheme"]

SCHEMES: list[Scheme]
CANONICAL: list[Scheme]
SCHEMES, CANONICAL = collect([contract], strategies)
BROAD = [scheme for scheme in CANONICAL if scheme.broad]
COMPRESSING = [scheme for scheme in CANONICAL if not scheme.is_local]
