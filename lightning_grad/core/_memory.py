"""What a rule that changes gradients remembers of one optimizer, and which parameters it belongs to.

Used by ``conditioner.py``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_grad.utilities.thresholds import Bucket


@dataclass
class Memory:
    """What is remembered of one optimizer.

    Args:
        steps: Optimizer steps seen.
        states: The rule's state of each bucket.
        since: Step from which on a bucket's state counts, where it is not the first.
        digests: Which parameters each bucket holds.
    """

    steps: int = 0
    states: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    since: dict[str, int] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, saved: Mapping[str, Any]) -> Memory:
        """Return what :meth:`save` gave."""
        states = {name: dict(state) for name, state in saved["states"].items()}
        return cls(saved["steps"], states, dict(saved.get("since", {})), dict(saved.get("digests", {})))

    def save(self) -> dict[str, Any]:
        """Return everything, in types that a checkpoint may hold."""
        copies = {name: {key: value.clone() for key, value in state.items()} for name, state in self.states.items()}
        return {"steps": self.steps, "states": copies, "since": dict(self.since), "digests": dict(self.digests)}

    def note(self, buckets: Sequence[Bucket]) -> None:
        """Remember which parameters each bucket holds."""
        self.digests = {bucket.name: _digest(bucket.names) for bucket in buckets}

    def assign(self, buckets: Sequence[Bucket]) -> list[str]:
        """Hand the states over to buckets of the same parameters, and return the names of those that get none."""
        old = {self.digests[name]: name for name in self.states if self.digests.get(name)}
        new = {bucket.name: old.get(_digest(bucket.names)) for bucket in buckets}
        lost = [name for name, source in new.items() if source is None]
        held = any(self.states.values())
        self.since = {name: self.steps if source is None else self.since.get(source, 0) for name, source in new.items()}
        self.states = {name: {} if source is None else self.states[source] for name, source in new.items()}
        return lost if held else []


def _digest(names: Sequence[str]) -> str:
    """Return a short mark of a set of names."""
    return hashlib.blake2b("\n".join(sorted(names)).encode(), digest_size=8).hexdigest()
