"""The first training step whose samples are weighted, run once without a trace, to find out how to weight them."""

from __future__ import annotations

import torch

from lightning_grad.core.quiet import eager, quiet
from lightning_grad.core.sample_losses import terms_of, trace_of
from lightning_grad.core.weighted_steps import ByCall, ByFunction, ByTerms, Step, Way, Weighing
from lightning_grad.core.whole_step import refuse_rest
from lightning_grad.functional.gradients import InseparableLossError, Terms, WholeLossCapture
from lightning_grad.utilities.checks import is_sharded


def choose_way(step: Step, weighing: Weighing) -> Way | None:
    """Return how the samples of a module's steps are weighted; ``None`` if the step has no loss to tell it by.

    Raises:
        InseparableLossError: If the loss is no sum of one term for each sample.
        RuntimeError: If the loss cannot be seen.
        ValueError: If its rows do not divide by the number of samples.
    """
    if weighing.loss_fn is not None:
        return ByFunction(weighing, weighing.loss_fn)
    by_call = ByCall(weighing, weighing.way_out)
    trainer = step.module._trainer
    # The parts of a sharded module have no parameters of their own to look at, and a manual step also trains.
    if weighing.which is not None or trainer is None or is_sharded(trainer) or not step.may_skip:
        return by_call
    advice = f", or {weighing.way_out}"
    with quiet(trainer, step.module, evaluate=False, advice=advice), eager(), torch.enable_grad():
        capture = WholeLossCapture(step.module, step.samples, way_out=weighing.way_out)
        with capture:
            output = step.run_on_copies()
        if output is None:
            return None  # the next step that has a loss tells
        try:
            refuse_rest(capture, capture.only(), output, weighing.label, weighing.way_out)
        except (RuntimeError, ValueError) as error:
            return ByTerms(weighing, _terms_after(error, step, weighing, capture))
    return by_call


def _terms_after(error: Exception, step: Step, weighing: Weighing, capture: WholeLossCapture) -> Terms:
    """Return the terms of a step that is not one call of a loss, as an error says."""
    if step.samples is None:
        raise RuntimeError(
            "The loss is more than one call of a loss, and the batch holds tensors of different lengths, so the "
            f"number of its samples is not known. {weighing.ways_out()}"
        ) from None
    try:
        return _first_terms(step, step.samples, weighing.ways_out(capture.calls[0].name if capture.calls else ""))
    except InseparableLossError:
        if isinstance(error, ValueError):  # which knows more of why there are too few rows
            raise ValueError(f"{weighing.label} weights the loss of each sample. {error}") from None
        raise


def _first_terms(step: Step, samples: int, ways_out: str) -> Terms:
    trace = trace_of(step.module, samples)
    with trace:
        output = step.run_on_copies()
    terms = terms_of(trace, output, ways_out)
    try:
        terms.weight_(torch.ones(samples)).remove()
    except InseparableLossError as error:
        raise InseparableLossError(error.function, error.location, f"{error.reason} {ways_out}") from None
    terms.release()
    return terms
