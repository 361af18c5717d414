"""The first training step whose samples are weighted, run once without a trace, to find out how to weight them."""

from __future__ import annotations

import torch
from lightning.pytorch.utilities import rank_zero_warn

from lightning_grad.core.losses.given_functions import GivenFunction, LossRequest, checked_losses, with_graph
from lightning_grad.core.losses.sample_losses import refuse_rest, terms_of, trace_of, trained_loss
from lightning_grad.core.losses.weighted_steps import ByCall, ByFunction, ByTerms, Step, Way, Weighing, outline_of
from lightning_grad.core.quiet import aside, eager, quiet
from lightning_grad.functional.gradients import InseparableLossError, Terms, WholeLossCapture
from lightning_grad.utilities.batch_copies import copy_of
from lightning_grad.utilities.checks import is_sharded


def choose_way(step: Step, weighing: Weighing) -> Way | None:
    """Return how the samples of a module's steps are weighted; ``None`` if the step has no loss to tell it by.

    Raises:
        InseparableLossError: If the loss is no sum of one term for each sample.
        RuntimeError: If the loss cannot be seen.
        ValueError: If its rows do not divide by the number of samples.
    """
    asked = weighing.asked
    if asked.loss_fn is not None:
        _try_function(step, asked.loss_fn, asked.label)
        return ByFunction(weighing, asked.loss_fn)
    by_call = ByCall(asked, weighing.reweight)
    trainer = step.module._trainer
    # The parts of a sharded module have no parameters of their own to look at, and a manual step also trains.
    if asked.which is not None or trainer is None or is_sharded(trainer) or not step.may_skip:
        return by_call
    with quiet(trainer, step.module, evaluate=False, advice=f", or {asked.way_out}"), eager(), torch.enable_grad():
        capture = WholeLossCapture(step.module, step.samples, way_out=asked.way_out)
        with capture:
            output = step.run_on_copies()
        if output is None:
            return None  # the next step that has a loss tells
        loss = trained_loss(output, asked.needs_losses())
        try:
            refuse_rest(capture, capture.only(), output, asked)
        except (RuntimeError, ValueError) as error:
            return ByTerms(weighing, _terms_after(error, step, asked, capture))
    by_call.outlines.add(outline_of(loss, capture.nodes))
    return by_call


def choose_again(step: Step, weighing: Weighing, way: ByCall) -> Way:
    """Return how samples are weighted from here on, after a step that computed its loss otherwise than the first.

    A schedule may add a term when its time comes. In the step that showed it only the call was weighted.

    Raises:
        InseparableLossError: If the loss is no sum of one term for each sample any more.
        RuntimeError: If it cannot be seen.
    """
    more = "training_step returns more than the one call of a loss that it returned at first"
    trainer = step.module._trainer
    # A step may talk to the other ranks, and on these it may be of the same form as ever.
    found = way if trainer is None or trainer.world_size > 1 else choose_way(step, weighing)
    if found is None:
        return way  # a later step tells
    if not isinstance(found, ByCall):
        rank_zero_warn(
            f"{weighing.asked.label}: {more}. In the step before only that call was weighted; from this one on the whole "
            "loss is."
        )
        return found
    if way.changed is not None and way.changed not in found.outlines:
        rank_zero_warn(
            f"{weighing.asked.label}: in some steps {more}, and only that call is weighted in these. Ignore it if what they "
            "add is the same for all samples. Otherwise let each step add it, with a factor of 0 where it does not count."
        )
        found.outlines.add(way.changed)
    found.outlines |= way.outlines
    found.changed = None
    return found


def _try_function(step: Step, loss_fn: GivenFunction, label: str) -> None:
    """Ask the function once, also where the first steps are not weighted."""
    with aside(step.module), torch.enable_grad():
        losses = with_graph(checked_losses(loss_fn(step.module, copy_of(step.batch)), step.samples), label)
    if len(losses) and not bool(losses.isfinite().any()):
        raise ValueError(
            f"{label} weights the losses that loss_fn returns, and in the first batch none of them is finite. Let loss_fn "
            "return the losses whose mean training_step returns."
        )


def _terms_after(error: Exception, step: Step, asked: LossRequest, capture: WholeLossCapture) -> Terms:
    """Return the terms of a step that is not one call of a loss, as an error says."""
    if step.samples is None:
        raise RuntimeError(
            "The loss is more than one call of a loss, the batch holds tensors of different lengths, and no sampler of torch "
            f"tells how many samples are in it. {asked.needs_losses()}"
        ) from None
    ways_out = asked.needs_losses(capture.calls[0].name if capture.calls else "")
    trace = trace_of(step.module, step.samples)
    with trace:
        output = step.run_on_copies()
    try:
        terms = terms_of(trace, output, ways_out)
        try:
            terms.weight_(torch.ones(step.samples)).remove()
        except InseparableLossError as found:
            raise InseparableLossError(found.function, found.location, f"{found.reason} {ways_out}") from None
    except InseparableLossError:
        if isinstance(error, ValueError):  # which knows more of why there are too few rows
            raise ValueError(f"{asked.label} weights the loss of each sample. {error}") from None
        raise
    terms.release()
    return terms
