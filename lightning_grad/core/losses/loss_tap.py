"""Reading, or reweighting, the loss of every sample in the training steps of a module.

Several techniques may read the losses of one module; at most one may reweight. Weights act in the backward pass: what the
step returns and logs as its loss stays the plain loss. Where one call of a loss of ``torch.nn.functional`` is the whole
loss, only that call is watched (:class:`~lightning_grad.core.losses.weighted_steps.WeighingCapture`); else the whole step is
traced, and the graph of what it returns tells what each sample contributes
(:class:`~lightning_grad.functional.gradients.LossTrace`). Which of both is decided once, by a quiet run of the first step
(``first_step.py``); how each of them weights stands in ``weighted_steps.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
import torch

from lightning_grad.core.dispatch import WrapOrder, wrap_method
from lightning_grad.core.losses.batch_sizes import batch_size_of
from lightning_grad.core.losses.first_step import choose_again, choose_way
from lightning_grad.core.losses.given_functions import ANY_LOSS, LossRequest, call_of
from lightning_grad.core.losses.sample_losses import classifying, only_loss, trained_loss
from lightning_grad.core.losses.weighted_steps import ByCall, Step, Way, Weigh, Weighing
from lightning_grad.core.quiet import aside, is_quiet
from lightning_grad.functional import LossCall, LossCapture

_TAPS: WeakKeyDictionary[Any, _LossTap] = WeakKeyDictionary()


def read_losses(
    pl_module: pl.LightningModule,
    reader: Callable[[LossCall], None],
    asked: LossRequest = ANY_LOSS,
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
    reweight: Weigh,
    asked: LossRequest,
    samples: Callable[[Any], int | None] | None = None,
    acts: bool = True,
    needs: Callable[[], bool] = lambda: True,
) -> Any:
    """Weight the samples of every training step in its backward pass.

    Args:
        pl_module: The module.
        reweight: Gets the losses, and returns a weight for each sample, or ``None`` to leave them alone.
        asked: What is asked of the losses of the step. ``loss_fn`` costs a second forward and backward pass.
        samples: Returns the number of samples of a batch, ``None`` if it is not known. Default: the length of its tensors.
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
            f"{tap.weighing.asked.label} and {asked.label} would both weight the samples of a batch. Keep one of them in the "
            "list of callbacks."
        )
    tap.weighing = Weighing(reweight, asked, acts, needs)
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
    asked: LossRequest
    by_classes: bool
    has_checked: bool = False  # the labels of outputs_fn
    # Which call classifies, by all calls of a step: looked at once, as it may wait for the device.
    known: dict[tuple[tuple[str, bool, bool], ...], int | None] = field(default_factory=dict)

    def call_of(self, capture: LossCapture, step: Step) -> LossCall:
        """Return what it is given of a step that has run."""
        if self.asked.outputs_fn is not None:
            assert step.samples is not None
            check, self.has_checked = not self.has_checked, True
            with aside(step.module), torch.no_grad():
                return call_of(self.asked.outputs_fn(step.module, step.batch), step.samples, check=check)
        which, capture.way_out = self.asked.which, self.asked.way_out
        if which is None and self.by_classes:
            calls = tuple((call.name, call.has_graph, call.has_class_indices) for call in capture.calls)
            if calls not in self.known:
                self.known[calls] = classifying(capture)
            which = self.known[calls]
        return only_loss(capture, self.asked, which)


class _LossTap:
    """The capture around one module's ``training_step``, there as long as it has a reader or a weighting."""

    def __init__(self, pl_module: pl.LightningModule) -> None:
        self.readers: list[_Reader] = []
        self.weighing: Weighing | None = None
        self.samples: Callable[[Any], int | None] = batch_size_of
        self._way: Way | None = None  # in which samples are weighted, once a step has shown it
        self._has_loss = False  # as some step has shown
        may_skip = pl_module.automatic_optimization

        def around(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if is_quiet(pl_module):
                return inner(*args, **kwargs)
            samples = self.samples(next(iter((*args, *kwargs.values()))))
            return self._run(Step(pl_module, inner, args, kwargs, samples, bool(self.readers), may_skip))

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

    def _run(self, step: Step) -> Any:
        if step.samples == 0:
            # None of the samples that are watched: another loader's batch, or a tuner that tries a few steps.
            return step.run()
        weighing = self.weighing
        needs = weighing is not None and weighing.needs()
        if weighing is not None and self._way is None and (weighing.acts or needs):
            self._way = choose_way(step, weighing)
        if not needs and not step.is_read:
            return step.run()
        if needs and weighing is not None and isinstance(self._way, ByCall) and self._way.changed:
            self._way = choose_again(step, weighing, self._way)
        asked = self.readers[0].asked if weighing is None else weighing.asked
        way: Way = ByCall(asked)
        if needs and weighing is not None:
            way = self._way or ByCall(asked, weighing.reweight)
        output, seen = way.run(step)
        if seen is not None:
            if self.readers and not self._has_loss and step.may_skip and torch.is_grad_enabled():
                trained_loss(output, self.readers[0].asked.needs_losses())
            self._has_loss = True
            for reader in self.readers:
                reader.read(reader.call_of(seen, step))
        return output
