"""What a rule on gradients is handed in one optimizer step, and what is remembered of the steps before.

Used by ``conditioner.py``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_grad.functional.plain_tensors import plain_tensor
from lightning_grad.utilities.thresholds import Bucket


@dataclass
class GradientStep:
    """What a rule is handed: gradients that one optimizer is about to use, and the rule's memory.

    Args:
        parameters: Those of the bucket that have a gradient.
        gradients: Theirs, accumulated, unscaled and reduced; to be changed in place.
        names: Their names.
        threshold: The number that holds for them; ``None`` if the technique has no threshold, or it is off.
        state: The rule's tensors for this bucket; empty at first.
        step: Optimizer steps that the technique has seen before this one.
        measured: Whether what the rule returns is logged.
        optimizer: Who will use them.
        index: Its number.
    """

    parameters: list[Tensor]
    gradients: list[Tensor]
    names: list[str]
    threshold: Any
    state: dict[str, Tensor]
    step: int
    measured: bool
    optimizer: Optimizer
    index: int

    @property
    def weights(self) -> list[Tensor]:
        """The parameters as plain tensors, to compute with."""
        return [plain_tensor(parameter) for parameter in self.parameters]

    def only(self, wanted: Callable[[Tensor], bool]) -> GradientStep:
        """Return the step with those gradients alone of which ``wanted`` is true."""
        chosen = [i for i, gradient in enumerate(self.gradients) if wanted(gradient)]
        lists = ("parameters", "gradients", "names")
        kept: dict[str, Any] = {name: [getattr(self, name)[i] for i in chosen] for name in lists}
        return replace(self, **kept)


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


def gather(bucket: Bucket, memory: Memory, measured: bool, optimizer: Optimizer, index: int) -> GradientStep:
    """Return what a rule is handed of one bucket: the parameters that have a gradient, and its memory."""
    parameters, names = bucket.parameters, bucket.names
    found: list[Any] = [parameter.grad for parameter in parameters]
    gradients: list[Any] = [g if g is None or type(g) is Tensor else plain_tensor(g) for g in found]
    if any(gradient is None for gradient in gradients):
        present = [i for i, gradient in enumerate(gradients) if gradient is not None]
        parameters, names = [parameters[i] for i in present], [names[i] for i in present]
        gradients = [gradients[i] for i in present]
    state = memory.states.setdefault(bucket.name, {})
    for key, value in state.items():
        if gradients and value.device != gradients[0].device:  # restored from a checkpoint
            state[key] = value.to(gradients[0].device)
    return GradientStep(parameters, gradients, names, bucket.threshold, state, memory.steps, measured, optimizer, index)
