"""The loss of a step and of each sample in it: from one call of ``torch.nn.functional``, or from its terms."""

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
    """Raise if the loss of a step is more than the mean of one loss call.

    A factor that is the same for all samples, and terms that do not depend on samples, are allowed.

    Args:
        capture: Capture of the step.
        call: Its loss call.
        output: Output of the step.
        asked: Requirements on the losses.

    Raises:
        RuntimeError: If the loss has other terms.
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
            f"{asked.display_name} takes logits and classes from {call.name}, but training_step does not train on all "
            f"of them: {rest}. Set loss_index={index} to use them anyway, or {asked.way_out}."
        )
    raise RuntimeError(
        f"{asked.display_name} captured {call.name}, which is only a part of what training_step returns: {rest}. Set "
        f"loss_index={index} to use {call.name} alone, or {asked.way_out}."
    )


def only_loss(capture: LossCapture, asked: LossRequest, loss_index: int | None = None) -> LossCall:
    """Return the loss call of a step.

    Args:
        capture: Capture of the step.
        asked: Requirements on the losses.
        loss_index: Index of the loss call to use. Default: the only call, or the only
            classification loss.

    Raises:
        RuntimeError: If no loss was captured, or several were and it is unclear which to use.
        ValueError: If its rows do not divide by the number of samples.
    """
    try:
        return capture.only(classifying(capture) if asked.by_classes and loss_index is None else loss_index)
    except (RuntimeError, ValueError) as error:
        raise type(error)(f"{asked.display_name} must capture the loss of each sample. {error}") from None


def classifying(capture: LossCapture) -> int | None:
    """Return the index of the only classification loss; ``None`` if there is none, or more than one.

    Contrastive losses, whose classes are positions in the batch, are ignored if there are others.
    Detecting them syncs with the device.
    """
    if any(unread.has_graph and unread.name.startswith(OF_CLASS_INDICES) for unread in capture.unread):
        return None
    found = [i for i, call in enumerate(capture.calls) if call.has_graph and call.has_class_indices]
    if len(found) > 1:
        found = [i for i in found if not are_all_positions(capture.calls[i])]
    return found[0] if len(found) == 1 else None


def trained_loss(output: object, ways_out: str) -> Tensor:
    """Return the loss in the output of a step.

    Args:
        output: Output of the step.
        ways_out: End of an error: which technique needs the loss, and what to do, in full
            sentences.

    Raises:
        ValueError: If the loss is not one number with a graph.
    """
    loss = loss_of_output(output)
    if loss is None or loss.numel() != 1 or loss.grad_fn is None:
        refuse_loss(loss, ways_out)
    return loss


def refuse_loss(loss: Tensor | None, ways_out: str) -> NoReturn:
    """Raise because a step returned no loss or an unsuitable one."""
    graph = "" if loss is None else f", which requires {'no gradient' if loss.grad_fn is None else 'a gradient'}"
    found = "no loss" if loss is None else f"a loss {tuple(loss.shape)}{graph}"
    raise ValueError(f"training_step must return a scalar loss that requires a gradient; got {found}. {ways_out}")


def loss_of_output(output: object) -> Tensor | None:
    """Return the loss in the output of a step as a plain tensor; ``None`` if there is none."""
    loss = output.get("loss") if isinstance(output, Mapping) else output
    return plain_tensor(loss) if isinstance(loss, Tensor) else None


_NO_TENSORS = frozenset([type(None), bool, int, float, str, dict, OrderedDict, set, list, tuple])


@dataclass(frozen=True, eq=False)
class SampleLosses:
    """The losses of the samples of one batch.

    Args:
        losses: Loss of each sample, (B,); nan if all its positions are ignored.
        call: Call of ``torch.nn.functional`` that they come from, if it is the whole loss.
        terms: Otherwise, terms of the step's loss.
        sums: Numerators and denominators of the call's mean.
        kind: How a loss by terms is read; "own" if the step divides by the positions of the batch.
        rest: Without call and terms, the losses come from a function; then the step's loss minus
            their mean.
    """

    losses: Tensor
    call: LossCall | None = None
    terms: Terms | None = None
    sums: SampleSums | None = None
    kind: SampleLoss | None = None
    rest: Tensor | float = 0.0

    @classmethod
    def of_terms(cls, terms: Terms, kind: SampleLoss) -> SampleLosses:
        """Return the losses by terms: for "own", the mean over a sample's own positions; else its share of the sum."""
        own = terms.own
        shares = terms.shares.masked_fill(own.detach().isnan(), float("nan"))  # nan for samples without positions
        return cls(own if kind == "own" else shares, terms=terms, kind=kind)

    @property
    def denominators(self) -> Tensor | None:
        """What each sample adds to the number that the batch divides by, (B,); ``None`` if that does not depend on it."""
        if self.call is not None and self.sums is not None:
            return self.sums.denominators.detach() if self.call.options["reduction"] == "mean" else None
        return self.terms.counts if self.terms is not None and self.kind == "own" else None

    def for_other_shares(self, weights: Tensor) -> Tensor:
        r"""Return weights under which the batch stands for data in which samples have other shares.

        .. math::
            w_b \leftarrow w_b \, \frac{\frac 1 B \sum_c D_c}{\sum_c w_c D_c / \sum_c w_c}

        A loss that ignores positions, or has class weights, divides by the sum of :math:`D_c` over the batch, where that
        of the other data belongs. Weights do not change if all D are equal.

        Args:
            weights: Share of each sample in the other data, relative to its share in the batches, (B,).
        """
        found = self.denominators
        if found is None:
            return weights
        found = found.to(weights)
        factor = found.mean() * weights.sum() / (weights * found).sum()
        return weights * torch.where(factor.isfinite(), factor, 1.0)  # a batch of ignored positions divides by 0

    def weighted(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss without and with weights, for logs."""
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
    """Return the output of a step with another loss in it."""
    return {**output, "loss": loss} if isinstance(output, Mapping) else loss


def trace_of(module: nn.Module, samples: int, keep_graph: bool = False) -> LossTrace:
    """Return a trace for a step of a module; the module's buffers and other tensors are constants in it."""
    own: list[Tensor] = []
    for part in module.modules():
        own += [value for value in part._buffers.values() if value is not None]
        # This runs in every step. Comparing classes first is faster than isinstance for each
        # attribute.
        own += [v for v in vars(part).values() if v.__class__ not in _NO_TENSORS and isinstance(v, Tensor)]
    return LossTrace(samples, keep_graph=keep_graph, constants=own)


def terms_of(trace: LossTrace, output: object, ways_out: str, like: Terms | None = None, check: bool = True) -> Terms:
    """Return the terms of a step's loss.

    Args:
        trace: Trace of the step.
        output: Output of the step.
        ways_out: End of an error: the technique that needs the terms, and what to do, as whole
            sentences.
        like: Terms of an earlier step with the same loss.
        check: Whether to compare their sum with the loss, which syncs with the device.

    Raises:
        InseparableLossError: If the loss cannot be separated into samples.
        ValueError: If the step returned no loss that requires a gradient.
    """
    loss = trained_loss(output, ways_out)
    try:
        return trace.terms(loss, like, check)
    except InseparableLossError as error:
        raise InseparableLossError(error.function, error.location, f"{error.reason} {ways_out}") from None
