"""What the samples of a batch contributed to one call of a loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_grad.functional.gradients.loss_functions import SampleSums, split, targets_are_classes


@dataclass(frozen=True, slots=True, eq=False)
class LossCall:
    r"""One call of a loss, with what each sample of the batch contributed to it.

    .. math::
        \ell_i = \frac{\sum_{p \in P_i} \ell_{ip}}{\sum_{p \in P_i} w_{ip}}

    where :math:`P_i` are the positions of sample i (one in plain classification, the tokens of a sentence, the pixels of an
    image, the entries of a vector), and :math:`w_{ip}` what each adds to the denominator of the mean: 1, 0 where ignored, or
    the weight of its class. So a loss is what the batch's mean would be for the sample alone.

    Attributes:
        name: The name of the function in ``torch.nn.functional``.
        input: What the loss got as ``input`` (for ``linear_cross_entropy`` the features, not the logits); detached.
        target: What the loss got as ``target``; detached.
        samples: B, the number of samples.
        losses: :math:`\ell_i`, (B,), float32 at least; nan for a sample all of whose positions are ignored. Also with
            ``reduction="sum"`` the mean over the positions; with "batchmean" the mean over the rows. Detached unless
            ``keep_graph``.
        valid: Which positions count, bool, in the shape of the loss with ``reduction="none"``.
        options: The other arguments by name, with their defaults: ``reduction``, ``weight``, ``ignore_index`` ...; detached.
        has_graph: Whether the loss can be differentiated. A figure computed for the log usually cannot.
        output: The ``input`` as it was given, with its graph, when ``keep_graph``; else ``None``.
    """

    name: str
    input: Tensor
    target: Tensor
    samples: int
    losses: Tensor
    valid: Tensor
    options: Mapping[str, Any]
    has_graph: bool
    output: Tensor | None = None

    @classmethod
    def of(
        cls,
        name: str,
        given: Mapping[str, Any],
        detached: Mapping[str, Any],
        valid: Tensor,
        sums: SampleSums,
        keep_graph: bool,
        has_graph: bool,
    ) -> LossCall:
        """Make it of the arguments of a call by name, as they are and detached, and of what its samples add up to."""
        losses = sums.numerators / sums.denominators
        return cls(
            name=name,
            input=detached["input"],
            target=detached["target"],
            samples=len(losses),
            losses=losses if keep_graph else losses.detach(),
            valid=valid,
            options={key: value for key, value in detached.items() if key not in ("input", "target")},
            has_graph=has_graph,
            output=given["input"] if keep_graph else None,
        )

    @property
    def has_class_indices(self) -> bool:
        """Whether each position has the index of a class as its target."""
        return targets_are_classes(self.name, self.target)

    @property
    def labels(self) -> Tensor | None:
        """The class of every sample, (B,), ``ignore_index`` included, when each has exactly one; ``None`` otherwise."""
        one_each = self.has_class_indices and self.target.numel() == self.samples
        return self.target.reshape(self.samples) if one_each else None

    def rows(self, values: Tensor) -> Tensor:
        """Return one value a position as (B, positions of a sample)."""
        return split(values, self.samples)
