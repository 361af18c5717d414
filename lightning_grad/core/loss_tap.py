"""Reading, or reweighting, the loss of every sample in the training steps of a module.

Several techniques may read the losses of one module; at most one may reweight. Weights act in the backward pass: what the
step returns and logs as its loss stays the plain loss. Where one call of a loss of ``torch.nn.functional`` is the whole
loss, only that call is watched (:class:`~._weighing_capture.WeighingCapture`); else the whole step is traced, and the graph
of what it returns tells what each sample contributes (:class:`~lightning_grad.functional.gradients.LossTrace`). Which of
both is decided once, by a quiet run of the first step.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from weakref import WeakKeyDictionary, ref

import lightning.pytorch as pl
import torch
import torch.utils._pytree as pytree
from torch import Tensor

from lightning_grad.core.dispatch import wrap_method
from lightning_grad.core.look import (
    SCORE_FN,
    LossFunction,
    call_of,
    checked_losses,
    only_loss,
    refuse_other_means,
)
from lightning_grad.core.quiet import aside, eager, is_quiet, quiet
from lightning_grad.core.sample_losses import SampleLoss, SampleLosses, terms_of, trace_of, with_loss
from lightning_grad.core.weighing_capture import Weigh, WeighingCapture, WithGradientOf
from lightning_grad.core.whole_step import loss_of_output, refuse_rest
from lightning_grad.functional import LossCall, LossCapture
from lightning_grad.functional._whole_loss import WholeLossCapture
from lightning_grad.functional.gradients import InseparableLossError, LossTrace, Terms
from lightning_grad.utilities.batch_copies import copy_of
from lightning_grad.utilities.checks import is_sharded

_INNERMOST = -100
_TAPS: WeakKeyDictionary[Any, _LossTap] = WeakKeyDictionary()


def read_losses(
    pl_module: pl.LightningModule,
    reader: Callable[[LossCall], None],
    which: int | None = None,
    samples: Callable[[], int] | None = None,
    way_out: str = SCORE_FN,
    needed_by: str = "A reader of losses",
    outputs_fn: LossFunction | None = None,
) -> Any:
    """Have ``reader`` called with the loss of every training step, after it.

    Args:
        pl_module: The module.
        reader: Gets the call of the loss.
        which: Which loss of the step, if it has several.
        samples: Tells the number of samples of the batch. Default: the length of its tensors.
        way_out: What to do about a loss that cannot be seen, as a clause that begins with a verb.
        needed_by: Who asks, for errors.
        outputs_fn: Gives logits and labels of a batch in place of the step, once more after each.

    Returns:
        Callable: Takes the reader away.
    """
    tap = _tap_of(pl_module)
    tap.samples = samples or tap.samples
    entry = (reader, which, way_out, needed_by, outputs_fn)
    tap.readers.append(entry)
    return lambda: tap.remove(entry)


def reweight_losses(
    pl_module: pl.LightningModule,
    reweight: Weigh,
    needed_by: str,
    which: int | None = None,
    samples: Callable[[], int] | None = None,
    way_out: str = SCORE_FN,
    acts: bool = True,
    needs: Callable[[], bool] = lambda: True,
    kind: Callable[[], SampleLoss] = lambda: None,
    loss_fn: LossFunction | None = None,
) -> Any:
    """Have the samples of every training step weighted in its backward pass.

    Args:
        pl_module: The module.
        reweight: Gets the losses, and returns a weight for each sample, or ``None`` to leave them alone.
        needed_by: Who asks, for errors.
        which: Which loss of the step alone is weighted. By default the whole.
        samples: Tells the number of samples of the batch. Default: the length of its tensors.
        way_out: What to do about a loss that cannot be seen, as a clause that begins with a verb.
        acts: Whether it will ever need a loss. The first step then shows whether the loss can be seen.
        needs: Tells whether it needs the losses of the present step; a step that nobody needs runs as if there were no tap.
        kind: Tells what the loss of a sample is where it comes from several terms.
        loss_fn: Gives the losses of the samples in place of the step: a second forward pass.

    Returns:
        Callable: Takes the weighting away.

    Raises:
        ValueError: If the module's samples are weighted already.
    """
    tap = _tap_of(pl_module)
    if tap.reweight is not None:
        raise ValueError(
            f"{tap.reweighted_by} and {needed_by} would both weight the samples of a batch. Keep one of them in the list of "
            "callbacks."
        )
    tap.reweight, tap.reweighted_by, tap.which, tap.way_out = reweight, needed_by, which, way_out
    tap.acts, tap.needs, tap.kind, tap.loss_fn = acts, needs, kind, loss_fn
    tap.samples = samples or tap.samples
    return lambda: tap.remove(None)


def _tap_of(pl_module: pl.LightningModule) -> _LossTap:
    if pl_module not in _TAPS:
        _TAPS[pl_module] = _LossTap(pl_module)
    return _TAPS[pl_module]


_Reader = tuple[Callable[[LossCall], None], int | None, str, str, LossFunction | None]


class _LossTap:
    """The capture around one module's ``training_step``, there as long as somebody wants it."""

    def __init__(self, pl_module: pl.LightningModule) -> None:
        self.readers: list[_Reader] = []
        self.reweight: Weigh | None = None
        self.reweighted_by = ""
        self.which: int | None = None
        self.way_out = SCORE_FN
        self.samples: Callable[[], int] | None = None
        self.acts = False
        self.needs: Callable[[], bool] = lambda: True
        self.kind: Callable[[], SampleLoss] = lambda: None
        self.loss_fn: LossFunction | None = None
        self._pairs: list[tuple[float, float]] = []  # of the mean of loss_fn and the step's loss, in the first batches
        self._module = ref(pl_module)
        self._seen = 0
        self._may_skip = pl_module.automatic_optimization
        self._is_decided = False
        self._terms: Terms | None = None  # of the first step, if its loss is more than one call

        def around(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return inner(*args, **kwargs) if is_quiet(pl_module) else self._step(inner, *args, **kwargs)

        self._undo = wrap_method(pl_module, "training_step", around, priority=_INNERMOST)

    def remove(self, entry: Any) -> None:
        if entry is None:
            self.reweight = None
            self._is_decided, self._terms, self.loss_fn, self._pairs = False, None, None, []
        else:
            self.readers = [other for other in self.readers if other is not entry]
        if self.reweight is None and not self.readers:
            self._undo()
            for module in [module for module, tap in _TAPS.items() if tap is self]:
                del _TAPS[module]

    def _step(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._seen = 0
        batch = next(iter((*args, *kwargs.values())))
        samples = batch_size_of(batch) if self.samples is None else self.samples()
        if samples == 0:
            # None of the samples that are watched: another loader's batch, or a tuner that tries a few steps.
            return inner(*args, **kwargs)
        needs = self.reweight is not None and self.needs()
        if self.reweight is not None and not self._is_decided and (self.acts or needs):
            self._decide(inner, args, kwargs, samples)
        if not needs and not self.readers:
            return inner(*args, **kwargs)
        if needs and self.loss_fn is not None:
            return self._step_by_function(self.loss_fn, inner, args, kwargs, samples)
        if needs and self._terms is not None:
            assert samples is not None
            return self._step_by_terms(inner, args, kwargs, samples)
        return self._step_by_call(inner, args, kwargs, samples, needs)

    def _step_by_call(self, inner: Callable[..., Any], args: Any, kwargs: Any, samples: int | None, needs: bool) -> Any:
        with WeighingCapture(samples, self._weights if needs else None, self.way_out) as capture:
            output = inner(*args, **kwargs)
        if output is None and self._may_skip:
            return None  # Lightning trains on no batch for which an automatic step returns nothing
        if needs:
            self._refuse_unweighted(capture)
        self._read(capture, next(iter((*args, *kwargs.values()))))
        return output

    def _step_by_terms(self, inner: Callable[..., Any], args: Any, kwargs: Any, samples: int) -> Any:
        trace = self._trace(samples)
        with trace:
            output = inner(*args, **kwargs)
        if output is None and self._may_skip:
            return None
        terms = terms_of(trace, output, self._ways_out(""), self._terms, check=False)
        assert self.reweight is not None
        weights = self.reweight(SampleLosses.of_terms(terms, self.kind()))
        if weights is not None:
            terms.weight_(weights)
        terms.release()
        capture = LossCapture(samples)
        capture.calls = trace.calls
        self._read(capture, next(iter((*args, *kwargs.values()))))
        return output

    def _step_by_function(
        self, loss_fn: LossFunction, inner: Callable[..., Any], args: Any, kwargs: Any, samples: int | None
    ) -> Any:
        """Run the step as it is, and give its loss the gradient of the weighted losses of the function."""
        module = self._module()
        assert module is not None
        batch = next(iter((*args, *kwargs.values())))
        given = copy_of(batch)  # the step may write into its own
        with aside(module):
            losses = loss_fn(module, given)  # with the random numbers that the step will draw
        capture = LossCapture(samples)
        with capture if self.readers else nullcontext():
            output = inner(*args, **kwargs)
        if output is None and self._may_skip:
            return None
        losses = checked_losses(losses, samples)
        loss = loss_of_output(output)
        if loss is None or loss.numel() != 1:
            raise ValueError(
                f"training_step must return one number as its loss, or None; {self.reweighted_by} found none."
            )
        self._compare(losses, loss)
        assert self.reweight is not None
        weights = self.reweight(SampleLosses(losses.detach()))
        self._read(capture, batch)
        if weights is None:
            return output
        weighted = (weights.to(losses) * losses).mean()
        weighted = weighted.reshape(loss.shape).to(loss.dtype)
        return with_loss(output, WithGradientOf.apply(loss.detach(), weighted))  # type: ignore[no-untyped-call]

    def _compare(self, losses: Tensor, loss: Tensor) -> None:
        """Refuse a function whose mean is not the loss of the first two steps, up to a constant."""
        if len(self._pairs) == 2:
            return
        self._pairs.append((float(losses.detach().mean()), float(loss.detach())))
        coarse = losses.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(loss.device.type)
        refuse_other_means(self._pairs, self.reweighted_by, "loss_fn", 5e-2 if coarse else 1e-3)

    def _read(self, capture: LossCapture, batch: Any) -> None:
        for reader, which, capture.way_out, needed_by, outputs_fn in self.readers:
            if outputs_fn is None:
                reader(only_loss(capture, needed_by, which))
                continue
            module = self._module()
            assert module is not None
            assert self.samples is not None
            with aside(module), torch.no_grad():
                reader(call_of(outputs_fn, module, batch, self.samples()))

    # The first step.

    def _decide(self, inner: Callable[..., Any], args: Any, kwargs: Any, samples: int | None) -> None:
        """Run the step without a trace, and find out whether one call of a loss is the whole loss.

        Raises:
            RuntimeError: If the loss cannot be seen.
        """
        module = self._module()
        assert module is not None
        trainer = module._trainer
        # The parts of a sharded module have no parameters of their own to look at, and a manual step also trains.
        if (
            self.loss_fn is not None
            or self.which is not None
            or trainer is None
            or is_sharded(trainer)
            or not self._may_skip
        ):
            self._is_decided = True
            return

        def run() -> object:
            given, named = copy_of([list(args), kwargs], leaves_in_graph=True)
            return inner(*given, **named)

        advice = f", or {self.way_out}"
        with quiet(trainer, module, evaluate=False, advice=advice), eager(), torch.enable_grad():
            capture = WholeLossCapture(module, samples, way_out=self.way_out)
            with capture:
                output = run()
            if output is None:
                return  # the next step that has a loss tells
            try:
                refuse_rest(capture, capture.only(), output, self.reweighted_by, self.way_out)
            except (RuntimeError, ValueError) as error:
                if samples is None:
                    raise RuntimeError(
                        "The loss is more than one call of a loss, and the batch holds tensors of different lengths, so the "
                        f"number of its samples is not known. {self._ways_out('')}"
                    ) from None
                try:
                    self._terms = self._first_terms(run, samples, capture.calls[0].name if capture.calls else "")
                except InseparableLossError:
                    if isinstance(error, ValueError):  # which knows more of why there are too few rows
                        raise ValueError(f"{self.reweighted_by} weights the loss of each sample. {error}") from None
                    raise
        self._is_decided = True

    def _first_terms(self, run: Callable[[], object], samples: int, call: str) -> Terms:
        trace = self._trace(samples)
        with trace:
            output = run()
        ways_out = self._ways_out(call)
        terms = terms_of(trace, output, ways_out)
        try:
            terms.weight_(torch.ones(samples)).remove()
        except InseparableLossError as error:
            raise InseparableLossError(error.function, error.location, f"{error.reason} {ways_out}") from None
        terms.release()
        return terms

    def _trace(self, samples: int) -> LossTrace:
        module = self._module()
        assert module is not None
        return trace_of(module, samples)

    def _ways_out(self, call: str) -> str:
        named = f"set loss=0 if {call} alone shall count, or " if call else ""
        clause = f"{named}{self.way_out}"
        return f"{self.reweighted_by} weights the loss of each sample, and must see it: {clause}."

    # One call.

    def _refuse_unweighted(self, capture: LossCapture) -> None:
        # An unseen or ambiguous loss is an error, and not a step without weights.
        try:
            capture.only(self.which)
        except (RuntimeError, ValueError) as error:
            raise type(error)(
                f"{self.reweighted_by} weights the loss of each sample, and must see it. {error}"
            ) from None

    def _weights(self, losses: SampleLosses) -> Tensor | None:
        assert self.reweight is not None
        assert losses.call is not None
        self._seen += 1
        is_meant = losses.call.has_graph if self.which is None else self._seen - 1 == self.which
        return self.reweight(losses) if is_meant else None


def batch_size_of(batch: Any) -> int | None:
    """Return the number of samples of a batch, if all its tensors agree on it.

    Example:
        >>> import torch
        >>> batch_size_of({"x": torch.zeros(4, 2), "y": torch.zeros(4)}), batch_size_of([torch.zeros(4), torch.zeros(3)])
        (4, None)
    """
    sizes = {len(leaf) for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()}
    return sizes.pop() if len(sizes) == 1 else None
