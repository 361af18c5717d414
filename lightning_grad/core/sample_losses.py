"""The loss of every sample of a batch, for any step: one call of ``torch.nn.functional``, or the terms of its graph."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_grad.core.whole_step import trained_loss
from lightning_grad.functional import LossCall
from lightning_grad.functional.gradients import InseparableLossError, LossTrace, SampleSums, Terms

_NO_TENSORS = frozenset([type(None), bool, int, float, str, dict, OrderedDict, set, list, tuple])

SampleLoss = Literal["share", "own"] | None


@dataclass(frozen=True, eq=False)
class SampleLosses:
    """The losses of the samples of one batch.

    Args:
        losses: One for each sample, (B,); nan where none of its positions counts.
        call: The call of a loss of ``torch.nn.functional`` that they come from, if it is the whole loss.
        terms: Else the terms of the step's loss.
        sums: What the call's mean is made of.
        rest: Without call and terms the losses are those of a function. Then this is what the loss is more than their mean.
    """

    losses: Tensor
    call: LossCall | None = None
    terms: Terms | None = None
    sums: SampleSums | None = None
    rest: Tensor | float = 0.0

    @classmethod
    def of_terms(cls, terms: Terms, kind: SampleLoss) -> SampleLosses:
        """Return the losses by terms: the mean over a sample's own positions for "own", else its share of the sum."""
        own = terms.own
        shares = terms.shares.masked_fill(own.detach().isnan(), float("nan"))  # a sample without a position has none
        return cls(own if kind == "own" else shares, terms=terms)

    def weighted(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss without and with weights, for a log."""
        if self.terms is not None:
            plain = torch.ones_like(self.losses, requires_grad=False)
            return self.terms.weighted_loss(plain), self.terms.weighted_loss(weights.nan_to_num(0.0))
        if self.call is None:
            losses = self.losses.detach()
            return losses.mean() + self.rest, (losses * weights).mean() + self.rest
        assert self.sums is not None
        numerators, denominators = (values.detach() for values in self.sums)
        divisor = 1.0 if self.call.options["reduction"] == "sum" else denominators.sum()
        return numerators.sum() / divisor, (numerators * weights.to(numerators).nan_to_num(0.0)).sum() / divisor


def with_loss(output: object, loss: Tensor) -> object:
    """Return what a step returned with another loss in it."""
    return {**output, "loss": loss} if isinstance(output, Mapping) else loss


def trace_of(module: nn.Module, samples: int, keep_graph: bool = False) -> LossTrace:
    """Return a trace for a step of a module, whose buffers and other tensors belong to no sample."""
    own: list[Tensor] = []
    for part in module.modules():
        own += [value for value in part._buffers.values() if value is not None]
        # This runs in every step. Comparing classes first is faster than isinstance for each attribute.
        own += [v for v in vars(part).values() if v.__class__ not in _NO_TENSORS and isinstance(v, Tensor)]
    return LossTrace(samples, keep_graph=keep_graph, constants=own)


def terms_of(trace: LossTrace, output: object, ways_out: str, like: Terms | None = None, check: bool = True) -> Terms:
    """Return the terms of what a step returned.

    Args:
        trace: That saw the step.
        output: What the step returned.
        ways_out: What a refusal adds: who needs the terms, and what to do, as whole sentences.
        like: Terms of an earlier step of this kind.
        check: Whether their sum is compared with the loss, which waits for the device.

    Raises:
        InseparableLossError: If the loss cannot be separated.
        ValueError: If the step returned no loss that is trained.
    """
    loss = trained_loss(output, ways_out)
    try:
        return trace.terms(loss, like, check)
    except InseparableLossError as error:
        raise InseparableLossError(error.function, error.location, f"{error.reason} {ways_out}") from None


def sum_of_flags(trainer: pl.Trainer, flags: list[bool]) -> list[int]:
    """Return on how many ranks each flag is set."""
    own = torch.tensor([float(flag) for flag in flags], device=trainer.strategy.root_device)
    total = own if trainer.world_size == 1 else torch.as_tensor(trainer.strategy.reduce(own, reduce_op="sum"))
    return [int(count) for count in total.tolist()]
