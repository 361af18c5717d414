"""The gradients that a rule gets in one optimizer step, and its memory of earlier steps."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_grad.functional.plain_tensors import plain_tensor
from lightning_grad.utilities.thresholds import Bucket


@dataclass
class GradientStep:
    """Argument of a rule: gradients that one optimizer is about to use, and the rule's state.

    Args:
        parameters: Parameters of the bucket that have a gradient.
        gradients: Their gradients, accumulated, unscaled and reduced. The rule changes them in
            place.
        names: Their names.
        threshold: Threshold of this bucket; ``None`` if the technique has none or it is off.
        state: The rule's tensors for this bucket; empty at first.
        step: Number of optimizer steps that the technique has seen before this one.
        measured: Whether the values that the rule returns are logged in this step.
        optimizer: Optimizer that will use the gradients.
        index: Index of the optimizer.
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
        """The parameters as plain tensors, for computation."""
        return [plain_tensor(parameter) for parameter in self.parameters]

    @property
    def is_idle(self) -> bool:
        """Whether the threshold is infinite and nothing is logged: a rule that only clips then has nothing to do."""
        return self.threshold == math.inf and not self.measured

    def only(self, wanted: Callable[[Tensor], bool]) -> GradientStep:
        """Return a copy of the step with only the gradients for which ``wanted`` returns True."""
        chosen = [i for i, gradient in enumerate(self.gradients) if wanted(gradient)]
        lists = ("parameters", "gradients", "names")
        kept: dict[str, Any] = {name: [getattr(self, name)[i] for i in chosen] for name in lists}
        return replace(self, **kept)


@dataclass
class Memory:
    """A rule's memory of one optimizer.

    Args:
        steps: Number of optimizer steps seen.
        states: The rule's state for each bucket.
        since: Step at which a bucket's state began, if that is not the first step.
        digests: Digest of the parameter names in each bucket.
    """

    steps: int = 0
    states: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    since: dict[str, int] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, saved: Mapping[str, Any]) -> Memory:
        """Return the memory that :meth:`save` wrote."""
        states = {name: dict(state) for name, state in saved["states"].items()}
        return cls(saved["steps"], states, dict(saved.get("since", {})), dict(saved.get("digests", {})))

    def save(self) -> dict[str, Any]:
        """Return the memory in types that a checkpoint may hold."""
        copies = {name: {key: value.clone() for key, value in state.items()} for name, state in self.states.items()}
        return {"steps": self.steps, "states": copies, "since": dict(self.since), "digests": dict(self.digests)}

    def note(self, buckets: Sequence[Bucket]) -> None:
        """Store which parameters each bucket holds."""
        self.digests = {bucket.name: _digest(bucket.names) for bucket in buckets}

    def assign(self, buckets: Sequence[Bucket]) -> list[str]:
        """Move the states to buckets with the same parameters; return the names of the buckets that get none."""
        old = {self.digests[name]: name for name in self.states if self.digests.get(name)}
        new = {bucket.name: old.get(_digest(bucket.names)) for bucket in buckets}
        lost = [name for name, source in new.items() if source is None]
        held = any(self.states.values())
        self.since = {name: self.steps if source is None else self.since.get(source, 0) for name, source in new.items()}
        self.states = {name: {} if source is None else self.states[source] for name, source in new.items()}
        return lost if held else []


def _digest(names: Sequence[str]) -> str:
    """Return a short digest of a set of names."""
    return hashlib.blake2b("\n".join(sorted(names)).encode(), digest_size=8).hexdigest()


def gather(bucket: Bucket, memory: Memory, measured: bool, optimizer: Optimizer, index: int) -> GradientStep:
    """Return the step of one bucket: its parameters that have a gradient, and the rule's memory of it."""
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
