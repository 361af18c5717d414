"""Reading, or reweighting, the loss of every sample in the training steps of a module.

Several techniques may read the losses of one module; at most one may reweight. Weights act in the backward pass: what the
step returns and logs as its loss stays the plain loss. Where one call of a loss of ``torch.nn.functional`` is the whole
loss, only that call is watched (:class:`~lightning_grad.core.losses.weighted_steps.WeighingCapture`); else the whole step is
traced, and the graph of what it returns tells what each sample contributes
(:class:`~lightning_grad.functional.LossTrace`). Which of both is decided once, by a quiet run of the first step
(:func:`choose_way`); how each of them weights stands in ``weighted_steps.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn

from lightning_grad.core.dispatch import WrapOrder, wrap_method
from lightning_grad.core.losses import given_functions as given
from lightning_grad.core.losses import sample_losses
from lightning_grad.core.losses import weighted_steps as ways
from lightning_grad.core.losses.batch_sizes import batch_size_of
from lightning_grad.core.quiet import aside, eager, is_quiet, quiet
from lightning_grad.functional import InseparableLossError, LossCall, LossCapture, Terms
from lightning_grad.functional.gradients.whole_loss import WholeLossCapture
from lightning_grad.utilities.batch_copies import copy_of
from lightning_grad.utilities.checks import is_sharded


def choose_way(step: ways.Step, weighing: ways.Weighing) -> ways.Way | None:
    """Return how the samples of a module's steps are weighted; ``None`` if the step has no loss to tell it by.

    Raises:
        InseparableLossError: If the loss is no sum of one term for each sample.
        RuntimeError: If the loss cannot be seen.
        ValueError: If its rows do not divide by the number of samples.
    """
    asked = weighing.asked
    if asked.loss_fn is not None:
        _try_function(step, asked.loss_fn, asked.display_name)
        return ways.ByFunction(weighing, asked.loss_fn)
    by_call = ways.ByCall(asked, weighing.reweight)
    trainer = step.module._trainer
    # The parts of a sharded module have no parameters of their own to look at, and a manual step also trains.
    if asked.loss_index is not None or trainer is None or is_sharded(trainer) or not step.may_skip:
        return by_call
    with quiet(trainer, step.module, evaluate=False, advice=f", or {asked.way_out}"), eager(), torch.enable_grad():
        capture = WholeLossCapture(step.module, step.samples, way_out=asked.way_out)
        with capture:
            output = step.run_on_copies()
        if output is None:
            return None  # the next step that has a loss tells
        loss = sample_losses.trained_loss(output, asked.needs_losses())
        try:
            sample_losses.refuse_rest(capture, capture.only(), output, asked)
        except (RuntimeError, ValueError) as error:
            return ways.ByTerms(weighing, _terms_after(error, step, asked, capture))
    by_call.outlines.add(ways.outline_of(loss, capture.nodes))
    return by_call


def choose_again(step: ways.Step, weighing: ways.Weighing, way: ways.ByCall) -> ways.Way:
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
    if not isinstance(found, ways.ByCall):
        rank_zero_warn(
            f"{weighing.asked.display_name}: {more}. In the step before only that call was weighted; from this one on "
            "the whole loss is."
        )
        return found
    if way.changed is not None and way.changed not in found.outlines:
        rank_zero_warn(
            f"{weighing.asked.display_name}: in some steps {more}, and only that call is weighted in these. Ignore it if "
            "what they add is the same for all samples. Otherwise let each step add it, with a factor of 0 where it does "
            "not count."
        )
        found.outlines.add(way.changed)
    found.outlines |= way.outlines
    found.changed = None
    return found


def _try_function(step: ways.Step, loss_fn: given.GivenFunction, display_name: str) -> None:
    """Ask the function once, also where the first steps are not weighted."""
    with aside(step.module), torch.enable_grad():
        losses = given.with_graph(
            given.checked_losses(loss_fn(step.module, copy_of(step.batch)), step.samples), display_name
        )
    if len(losses) and not bool(losses.isfinite().any()):
        raise ValueError(
            f"{display_name} weights the losses that loss_fn returns, and in the first batch none of them is finite. Let "
            "loss_fn return the losses whose mean training_step returns."
        )


def _terms_after(error: Exception, step: ways.Step, asked: given.LossRequest, capture: WholeLossCapture) -> Terms:
    """Return the terms of a step that is not one call of a loss, as an error says."""
    if step.samples is None:
        raise RuntimeError(
            "The loss is more than one call of a loss, the batch holds tensors of different lengths, and no sampler of torch "
            f"tells how many samples are in it. {asked.needs_losses()}"
        ) from None
    ways_out = asked.needs_losses(capture.calls[0].name if capture.calls else "")
    trace = sample_losses.trace_of(step.module, step.samples)
    with trace:
        output = step.run_on_copies()
    try:
        terms = sample_losses.terms_of(trace, output, ways_out)
        try:
            terms.weight_(torch.ones(step.samples)).remove()
        except InseparableLossError as found:
            raise InseparableLossError(found.function, found.location, f"{found.reason} {ways_out}") from None
    except InseparableLossError:
        if isinstance(error, ValueError):  # which knows more of why there are too few rows
            raise ValueError(f"{asked.display_name} weights the loss of each sample. {error}") from None
        raise
    terms.release()
    return terms


_TAPS: WeakKeyDictionary[Any, _LossTap] = WeakKeyDictionary()


def read_losses(
    pl_module: pl.LightningModule,
    reader: Callable[[LossCall], None],
    asked: given.LossRequest = given.ANY_LOSS,
    samples: Callable[[Any], int | None] | None = None,
) -> Any:
    """Call ``reader`` with the loss of every training step, after it.

    Args:
        pl_module: The module.
        reader: Gets the call of the loss.
        asked: What is asked of the losses of the step. ``outputs_fn`` is called once more after each.
        samples: Returns the number of samples of a batch, ``None`` if it is not known. Default: the length of its tensors.

    Returns:
        Callable: Takes the reader away.
    """
    tap = _tap_of(pl_module)
    tap.samples = samples or tap.samples
    entry = _Reader(reader, replace(asked, by_classes=False), asked.by_classes)
    tap.readers.append(entry)
    return lambda: tap.remove(entry)


def reweight_losses(
    pl_module: pl.LightningModule,
    reweight: ways.Weigh,
    asked: given.LossRequest,
    samples: Callable[[Any], int | None] | None = None,
    acts: bool = True,
    needs: Callable[[], bool] = lambda: True,
) -> Any:
    """Weight the samples of every training step in its backward pass.

    Args:
        pl_module: The module.
        reweight: Gets the losses, and returns a weight for each sample, or ``None`` to leave them alone.
        asked: What is asked of the losses of the step. ``loss_fn`` costs a second forward and backward pass.
        samples: As in :func:`read_losses`, whose count holds where there are both: a reader credits samples by their index.
        acts: Whether it will ever need a loss. The first step then shows whether the loss can be seen.
        needs: Tells whether it needs the losses of the present step; one that does not runs as if there were no tap.

    Returns:
        Callable: Takes the weighting away.

    Raises:
        ValueError: If the module's samples are weighted already.
    """
    tap = _tap_of(pl_module)
    if tap.weighing is not None:
        raise ValueError(
            f"{tap.weighing.asked.display_name} and {asked.display_name} would both weight the samples of a batch. Keep "
            "one of them in the list of callbacks."
        )
    tap.weighing = ways.Weighing(reweight, asked, acts, needs)
    if tap.samples is batch_size_of:
        tap.samples = samples or tap.samples
    return lambda: tap.remove(None)


def _tap_of(pl_module: pl.LightningModule) -> _LossTap:
    if pl_module not in _TAPS:
        _TAPS[pl_module] = _LossTap(pl_module)
    return _TAPS[pl_module]


@dataclass(eq=False)
class _Reader:
    """One that reads the losses of the steps; see :func:`read_losses`."""

    read: Callable[[LossCall], None]
    asked: given.LossRequest
    by_classes: bool
    has_checked: bool = False  # the labels of outputs_fn
    # Which call classifies, by all calls of a step: looked at once, as it may wait for the device.
    known: dict[tuple[tuple[str, bool, bool], ...], int | None] = field(default_factory=dict)

    def call_of(self, capture: LossCapture, step: ways.Step) -> LossCall:
        """Return what it is given of a step that has run."""
        if self.asked.outputs_fn is not None:
            assert step.samples is not None
            check, self.has_checked = not self.has_checked, True
            with aside(step.module), torch.no_grad():
                return given.call_of(self.asked.outputs_fn(step.module, step.batch), step.samples, check=check)
        loss_index, capture.way_out = self.asked.loss_index, self.asked.way_out
        if loss_index is None and self.by_classes:
            calls = tuple((call.name, call.has_graph, call.has_class_indices) for call in capture.calls)
            if calls not in self.known:
                self.known[calls] = sample_losses.classifying(capture)
            loss_index = self.known[calls]
        return sample_losses.only_loss(capture, self.asked, loss_index)


class _LossTap:
    """The capture around one module's ``training_step``, there as long as it has a reader or a weighting."""

    def __init__(self, pl_module: pl.LightningModule) -> None:
        self.readers: list[_Reader] = []
        self.weighing: ways.Weighing | None = None
        self.samples: Callable[[Any], int | None] = batch_size_of
        self._way: ways.Way | None = None  # in which samples are weighted, once a step has shown it
        self._has_loss = False  # as some step has shown
        may_skip = pl_module.automatic_optimization

        def around(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if is_quiet(pl_module):
                return inner(*args, **kwargs)
            samples = self.samples(next(iter((*args, *kwargs.values()))))
            return self._run(ways.Step(pl_module, inner, args, kwargs, samples, bool(self.readers), may_skip))

        self._undo = wrap_method(pl_module, "training_step", around, order=WrapOrder.LOSSES)

    def remove(self, entry: _Reader | None) -> None:
        if entry is None:
            self.weighing, self._way = None, None
        else:
            self.readers = [other for other in self.readers if other is not entry]
        if self.weighing is None and not self.readers:
            self._undo()
            for module in [module for module, tap in _TAPS.items() if tap is self]:
                del _TAPS[module]

    def _run(self, step: ways.Step) -> Any:
        if step.samples == 0:
            # None of the samples that are watched: another loader's batch, or a tuner that tries a few steps.
            return step.run()
        weighing = self.weighing
        needs = weighing is not None and weighing.needs()
        if weighing is not None and self._way is None and (weighing.acts or needs):
            self._way = choose_way(step, weighing)
        if not needs and not step.is_read:
            return step.run()
        if needs and weighing is not None and isinstance(self._way, ways.ByCall) and self._way.changed:
            self._way = choose_again(step, weighing, self._way)
        asked = self.readers[0].asked if weighing is None else weighing.asked
        way: ways.Way = ways.ByCall(asked)
        if needs and weighing is not None:
            way = self._way or ways.ByCall(asked, weighing.reweight)
        output, seen = way.run(step)
        if seen is not None:
            if self.readers and not self._has_loss and step.may_skip and torch.is_grad_enabled():
                sample_losses.trained_loss(output, self.readers[0].asked.needs_losses())
            self._has_loss = True
            for reader in self.readers:
                reader.read(reader.call_of(seen, step))
        return output
