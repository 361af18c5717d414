"""What a step returns as its loss, and the loss of each sample in it: one call of ``torch.nn.functional``, or its terms."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor, nn

from lightning_grad.core.losses.given_functions import LossRequest, SampleLoss
from lightning_grad.core.losses.row_order import are_all_positions
from lightning_grad.functional import InseparableLossError, LossCall, LossCapture, LossTrace, Terms
from lightning_grad.functional.gradients.loss_functions import OF_CLASS_INDICES, SampleSums
from lightning_grad.functional.gradients.whole_loss import WholeLossCapture
from lightning_grad.functional.plain_tensors import plain_tensor


def refuse_rest(capture: WholeLossCapture, call: LossCall, output: object, asked: LossRequest) -> None:
    """Raise if what a step returns is more than the mean of one loss.

    A factor that is the same for all samples does not count, nor do terms that do not depend on samples.

    Args:
        capture: What was seen of the step.
        call: Its loss.
        output: What it returned.
        asked: What is asked of it.

    Raises:
        RuntimeError: If it is.
    """
    loss = loss_of_output(output)
    if loss is None or loss.numel() != 1:
        refuse_loss(loss, asked.needs_losses())
    by_classes = asked.by_classes and call.has_class_indices
    rest = capture.missing_in(loss, call) if by_classes else capture.rest_of(loss, call)
    if rest is None:
        return
    index = capture.calls.index(call)
    if by_classes:
        raise RuntimeError(
            f"{asked.display_name} takes logits and classes from {call.name}, and training_step does not train on all of "
            f"them: {rest}. Set loss_index={index} to use them all the same, or {asked.way_out}."
        )
    raise RuntimeError(
        f"{asked.display_name} sees {call.name}, which is not all that training_step returns: {rest}. It would take a part "
        f"of the loss for the whole. Set loss_index={index} if {call.name} alone shall count, or {asked.way_out}."
    )


def only_loss(capture: LossCapture, asked: LossRequest, loss_index: int | None = None) -> LossCall:
    """Return the loss of a step that was run.

    Args:
        capture: What was seen of it.
        asked: What is asked of it.
        loss_index: Index of the loss call that counts; by default the only one, or the only one that classifies.

    Raises:
        RuntimeError: If no loss can be read, or it is not clear which of several is meant.
        ValueError: If the rows of the only one do not divide by the number of samples.
    """
    try:
        return capture.only(classifying(capture) if asked.by_classes and loss_index is None else loss_index)
    except (RuntimeError, ValueError) as error:
        raise type(error)(f"{asked.display_name} must see the loss of each sample. {error}") from None


def classifying(capture: LossCapture) -> int | None:
    """Return the index of the only call that classifies; ``None`` if there is none, or more than one.

    A contrastive loss, whose classes are the places of the rows in the batch, is not counted next to another. Seeing that
    waits for the device.
    """
    if any(unread.has_graph and unread.name.startswith(OF_CLASS_INDICES) for unread in capture.unread):
        return None
    found = [i for i, call in enumerate(capture.calls) if call.has_graph and call.has_class_indices]
    if len(found) > 1:
        found = [i for i in found if not are_all_positions(capture.calls[i])]
    return found[0] if len(found) == 1 else None


def trained_loss(output: object, ways_out: str) -> Tensor:
    """Return the loss in what a step returned.

    Args:
        output: What the step returned.
        ways_out: What a refusal adds: who needs the loss, and what to do, as whole sentences.

    Raises:
        ValueError: If it is not one number that is trained by.
    """
    loss = loss_of_output(output)
    if loss is None or loss.numel() != 1 or loss.grad_fn is None:
        refuse_loss(loss, ways_out)
    return loss


def refuse_loss(loss: Tensor | None, ways_out: str) -> NoReturn:
    """Raise, because a step returned no loss, or something else as its loss."""
    graph = "" if loss is None else f", which requires {'no gradient' if loss.grad_fn is None else 'a gradient'}"
    found = "no loss" if loss is None else f"a loss {tuple(loss.shape)}{graph}"
    raise ValueError(f"training_step must return one number that is trained by; got {found}. {ways_out}")


def loss_of_output(output: object) -> Tensor | None:
    """Return the loss in what a step returned, if it is there, as a plain tensor."""
    loss = output.get("loss") if isinstance(output, Mapping) else output
    return plain_tensor(loss) if isinstance(loss, Tensor) else None


_NO_TENSORS = frozenset([type(None), bool, int, float, str, dict, OrderedDict, set, list, tuple])


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
