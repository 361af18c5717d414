"""Read the loss of every sample in the training steps of a module, weight it, or add to it.

Several techniques may read the losses of one module. At most one may write: weight the samples
(:func:`reweight_losses`) or add a term (:func:`add_to_losses`). A second writer raises an error that
names both, because the result would depend on their order. Both act in the backward pass: the loss
that the step returns and logs stays the plain loss. If one call of
``torch.nn.functional`` is the whole loss, only that call is captured
(:class:`~lightning_grad.core.losses.weighted_steps.WeighingCapture`). Otherwise the whole step is
traced, and the autograd graph of its loss shows the contribution of each sample
(:class:`~lightning_grad.functional.LossTrace`). A quiet run of the first step decides between the
two (:func:`choose_way`); ``weighted_steps.py`` implements them.
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
from lightning_grad.core.steps.step_window import is_repeated
from lightning_grad.functional import InseparableLossError, LossCall, LossCapture, Terms
from lightning_grad.functional.gradients.added_terms import AddedTerms
from lightning_grad.functional.gradients.whole_loss import WholeLossCapture
from lightning_grad.utilities.batch_copies import copy_of
from lightning_grad.utilities.checks import is_sharded


def choose_way(step: ways.Step, weighing: ways.Weighing) -> ways.Way | None:
    """Return the way to weight the samples of a module's steps; ``None`` if this step returns no loss.

    Raises:
        InseparableLossError: If the loss is not a sum of one term for each sample.
        RuntimeError: If the loss cannot be captured.
        ValueError: If its rows do not divide by the number of samples.
    """
    asked = weighing.asked
    if asked.loss_fn is not None:
        _try_function(step, asked.loss_fn, asked.display_name)
        return ways.ByFunction(weighing, asked.loss_fn)
    by_call = ways.ByCall(asked, weighing.reweight)
    trainer = step.module._trainer
    # Only a call can be weighted in a sharded module, whose parts have no parameters to trace, and
    # in a manual step, which cannot be run without training.
    if asked.loss_index is not None or trainer is None or is_sharded(trainer) or not step.may_skip:
        return by_call
    with quiet(trainer, step.module, evaluate=False, advice=f", or {asked.way_out}"), eager(), torch.enable_grad():
        capture = WholeLossCapture(step.module, step.samples, way_out=asked.way_out)
        with capture:
            output = step.run_on_copies()
        if output is None:
            return None  # the next step with a loss decides
        loss = sample_losses.trained_loss(output, asked.needs_losses())
        try:
            sample_losses.refuse_rest(capture, capture.only(), output, asked)
        except (RuntimeError, ValueError) as error:
            return ways.ByTerms(weighing, _terms_after(error, step, asked, capture))
    by_call.outlines.add(ways.outline_of(loss, capture.nodes))
    return by_call


def choose_again(step: ways.Step, weighing: ways.Weighing, way: ways.ByCall) -> ways.Way:
    """Return the way to weight samples after a step whose loss was computed differently from the first.

    For example, a schedule may add a term during training. In the step that showed it, only the
    call was weighted.

    Raises:
        InseparableLossError: If the loss is no longer a sum of one term for each sample.
        RuntimeError: If it cannot be captured.
    """
    more = "training_step returns more than the one loss call that it returned at first"
    trainer = step.module._trainer
    # With several ranks the step is not run again: it may communicate, and other ranks may not have
    # seen a change.
    found = way if trainer is None or trainer.world_size > 1 else choose_way(step, weighing)
    if found is None:
        return way  # a later step decides
    if not isinstance(found, ways.ByCall):
        rank_zero_warn(
            f"{weighing.asked.display_name}: {more}. In the previous step only that call was weighted; from this step "
            "on, the whole loss is weighted."
        )
        return found
    if way.changed is not None and way.changed not in found.outlines:
        rank_zero_warn(
            f"{weighing.asked.display_name}: in some steps {more}, and only that call is weighted in them. Ignore "
            "this warning if the other terms are the same for all samples. Otherwise add them in every step, with a "
            "factor of 0 where they do not apply."
        )
        found.outlines.add(way.changed)
    found.outlines |= way.outlines
    found.changed = None
    return found


def _try_function(step: ways.Step, loss_fn: given.GivenFunction, display_name: str) -> None:
    """Call the function once to check it, even if the first steps are not weighted."""
    with aside(step.module), torch.enable_grad():
        losses = given.with_graph(
            given.checked_losses(loss_fn(step.module, copy_of(step.batch)), step.samples), display_name
        )
    if len(losses) and not bool(losses.isfinite().any()):
        raise ValueError(
            f"{display_name} weights the losses of loss_fn, but in the first batch none of them is finite. Make "
            "loss_fn return the losses whose mean training_step returns."
        )


def _terms_after(error: Exception, step: ways.Step, asked: given.LossRequest, capture: WholeLossCapture) -> Terms:
    """Return the terms of a step whose loss is not one call; ``error`` is the reason why it is not."""
    if step.samples is None:
        raise RuntimeError(
            "The loss is more than one loss call, and the number of samples is unknown: the batch holds tensors of "
            f"different lengths, and no sampler of torch provides the number. {asked.needs_losses()}"
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
        if isinstance(error, ValueError):  # it explains better why there are too few rows
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
    """Call ``reader`` with the loss call of every training step, after the step.

    Args:
        pl_module: The module.
        reader: Function that gets the loss call.
        asked: Requirements on the losses. ``outputs_fn``, if set, is called after each step.
        samples: Function (batch) -> number of samples, ``None`` if unknown. Default: the length of
            its tensors.

    Returns:
        Callable: Removes the reader.
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
        reweight: Function (losses) -> weight of each sample, or ``None`` to change nothing.
        asked: Requirements on the losses. ``loss_fn`` costs a second forward and backward pass.
        samples: As in :func:`read_losses`, whose function takes precedence if both are set.
        acts: Whether it will need losses in any step. If so, the first step checks that they can be
            captured.
        needs: Function that returns True if the current step needs losses; other steps run as
            without a tap.

    Returns:
        Callable: Removes the weighting.

    Raises:
        ValueError: If another technique already weights the module's samples, or adds to its losses.
    """
    tap = _tap_of(pl_module)
    weighing = ways.Weighing(reweight, asked, acts, needs)
    tap.write(weighing, asked.display_name)
    if tap.samples is batch_size_of:
        tap.samples = samples or tap.samples
    return lambda: tap.remove(weighing)


def add_to_losses(pl_module: pl.LightningModule, terms: AddedTerms, display_name: str) -> Any:
    """Add a term to the softmax losses of every training step, in its backward pass.

    Quiet runs of the step, such as scores and attacks, see the plain loss.

    Args:
        pl_module: The module.
        terms: Context that adds the terms; each step runs inside it.
        display_name: Name of the technique, for errors.

    Returns:
        Callable: Removes the terms.

    Raises:
        ValueError: If another technique already weights the module's samples, or adds to its losses.
    """
    tap = _tap_of(pl_module)
    tap.write(terms, display_name)
    return lambda: tap.remove(terms)


def _tap_of(pl_module: pl.LightningModule) -> _LossTap:
    if pl_module not in _TAPS:
        _TAPS[pl_module] = _LossTap(pl_module)
    return _TAPS[pl_module]


def _inside(terms: AddedTerms, inner: Callable[..., Any]) -> Callable[..., Any]:
    """Return a step that runs inside a context, so a capture of losses is further outside and sees its calls."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with terms:
            return inner(*args, **kwargs)

    return run


@dataclass(eq=False)
class _Reader:
    """A reader of losses; see :func:`read_losses`."""

    read: Callable[[LossCall], None]
    asked: given.LossRequest
    by_classes: bool
    has_checked: bool = False  # whether the labels of outputs_fn were checked
    # The index of the classification loss for each set of calls: found once, because it may sync
    # with the device.
    known: dict[tuple[tuple[str, bool, bool], ...], int | None] = field(default_factory=dict)

    def call_of(self, capture: LossCapture, step: ways.Step) -> LossCall:
        """Return the loss call of a finished step for this reader."""
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
    """The wrapper of one module's ``training_step``; it exists while it has a reader or a writer."""

    def __init__(self, pl_module: pl.LightningModule) -> None:
        self.readers: list[_Reader] = []
        self.writer: tuple[ways.Weighing | AddedTerms, str] | None = None  # with its name
        self.samples: Callable[[Any], int | None] = batch_size_of
        self._way: ways.Way | None = None  # the way to weight samples, chosen in the first step with a loss
        self._has_loss = False  # whether a step has returned a loss
        may_skip = pl_module.automatic_optimization

        def around(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if is_quiet(pl_module):
                return inner(*args, **kwargs)
            if self.terms is not None:
                inner = _inside(self.terms, inner)
            if not self.readers and self.weighing is None:
                return inner(*args, **kwargs)
            samples = self.samples(next(iter((*args, *kwargs.values()))))
            is_read = bool(self.readers) and not is_repeated(pl_module)
            return self._run(ways.Step(pl_module, inner, args, kwargs, samples, is_read, may_skip))

        self._undo = wrap_method(pl_module, "training_step", around, order=WrapOrder.LOSSES)

    @property
    def weighing(self) -> ways.Weighing | None:
        """The technique that weights samples."""
        return self.writer[0] if self.writer is not None and isinstance(self.writer[0], ways.Weighing) else None

    @property
    def terms(self) -> AddedTerms | None:
        """The terms that a technique adds."""
        return self.writer[0] if self.writer is not None and isinstance(self.writer[0], AddedTerms) else None

    def write(self, writer: ways.Weighing | AddedTerms, display_name: str) -> None:
        """Let a technique write the loss; raise if another does."""
        if self.writer is not None:
            other, its_name = self.writer
            both_weight = isinstance(writer, ways.Weighing) and isinstance(other, ways.Weighing)
            what = "weight the samples of a batch" if both_weight else "change the loss of a step"
            raise ValueError(
                f"{its_name} and {display_name} would both {what}. Keep one of them in the list of callbacks."
            )
        self.writer = writer, display_name

    def remove(self, entry: _Reader | ways.Weighing | AddedTerms) -> None:
        if self.writer is not None and entry is self.writer[0]:
            self.writer, self._way = None, None
        self.readers = [other for other in self.readers if other is not entry]
        if self.writer is None and not self.readers:
            self._undo()
            for module in [module for module, tap in _TAPS.items() if tap is self]:
                del _TAPS[module]

    def _run(self, step: ways.Step) -> Any:
        """Run a step, choosing the way to weight it first if none is chosen, and pass its losses to the readers."""
        if step.samples == 0:
            # The batch holds no samples of this training set: it is another loader's, or a tuner's
            # trial step.
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
            if step.is_read and not self._has_loss and step.may_skip and torch.is_grad_enabled():
                sample_losses.trained_loss(output, self.readers[0].asked.needs_losses())
            self._has_loss = True
            for reader in self.readers if step.is_read else ():
                reader.read(reader.call_of(seen, step))
        return output
