"""One batch of a training set, and the means to see what the module's own ``training_step`` makes of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_grad.core.sample_losses import SampleLoss, SampleLosses, terms_of, trace_of
from lightning_grad.core.whole_step import classifying, refuse_rest
from lightning_grad.functional import LossCall, LossCapture, PerSampleGradientNorms
from lightning_grad.functional.gradients import InseparableLossError, WholeLossCapture

Measure = Callable[["Look"], Mapping[str, Tensor]]


SCORE_FN = "give score_fn= in place of a score: it takes the module and a batch, and returns the scores"
LOSS_FN = "give loss_fn=, which takes the module and a batch, and returns the loss of each sample"
OUTPUTS_FN = "give outputs_fn=, which takes the module and a batch, and returns logits and labels"
_IGNORED = -100  # by cross_entropy
LossFunction = Callable[[pl.LightningModule, Any], Any]


def only_loss(capture: LossCapture, label: str, which: int | None = None, by_classes: bool = False) -> LossCall:
    """Return the loss of a step that was run.

    Args:
        capture: What was seen of it.
        label: Who asks, for errors.
        which: Which of several losses counts.
        by_classes: Whether the only one that classifies counts, where there are others.

    Raises:
        RuntimeError: If no loss can be read, or it is not clear which of several is meant.
        ValueError: If the rows of the only one do not divide by the number of samples.
    """
    try:
        return capture.only(classifying(capture) if by_classes and which is None else which)
    except (RuntimeError, ValueError) as error:
        raise type(error)(f"{label} must see the loss of each sample. {error}") from None


class SkippedBatchError(Exception):
    """The step returned nothing for a batch, as it does for one that Lightning is to train nothing on."""


@dataclass
class Look:
    """One batch, and the means to see what the module makes of it.

    Args:
        pl_module: The module, in eval mode.
        batch: Its batch, on the device.
        indices: The samples' indices in the data set.
        total: Length of the data set.
        run: Runs ``training_step`` on it.
        memory: What a measure wants to keep from batch to batch.
        which: Which loss of the step counts, whatever else it computes. By default the one whose mean the step returns.
        label: Who looks, for errors.
        way_out: What to do about a loss that cannot be seen, as a clause that begins with a verb.
        kind: Tells what the loss of a sample is where it comes from several terms; asked once.
        loss_fn: Gives the losses of the samples in place of the step.
        outputs_fn: Gives logits and labels in place of the step.
        by_classes: Whether only logits and classes matter, so that other terms may be added to the loss that classifies.
    """

    pl_module: pl.LightningModule
    batch: Any
    indices: list[int]
    total: int
    run: Callable[[], object]
    memory: dict[str, Any] = field(default_factory=dict)
    which: int | None = None
    label: str = "The score"
    way_out: str = SCORE_FN
    kind: Callable[[], SampleLoss] | None = None
    loss_fn: LossFunction | None = None
    outputs_fn: LossFunction | None = None
    by_classes: bool = False

    def losses(self, keep_graph: bool = False) -> SampleLosses:
        """Run the step and return the loss of every sample, of whatever the step's loss consists.

        Raises:
            SkippedBatchError: If the step returns nothing.
            InseparableLossError: If the loss is no sum of one term for each sample.
            ValueError: If ``loss_fn`` does not return one loss for each sample.
        """
        if self.loss_fn is not None:
            with torch.set_grad_enabled(keep_graph):
                losses = losses_of(self.loss_fn, self.pl_module, self.batch, len(self.indices))
            return SampleLosses(with_graph(losses, self.label) if keep_graph else losses)
        if self.which is None and not self.memory.keys() & {"whole", "terms"}:
            capture, output = self._first_run()
            try:
                call = self._whole_call(capture, output)
                return SampleLosses(call.losses if keep_graph else call.losses.detach(), call)
            except (RuntimeError, ValueError) as error:  # there is more than one call, or none
                self.memory["calls"] = [call.name for call in capture.calls]
                try:
                    return self._by_terms(keep_graph)
                except InseparableLossError:
                    if isinstance(error, ValueError):  # which knows more of why there are too few rows
                        raise error from None
                    raise
        if "terms" in self.memory:
            return self._by_terms(keep_graph)
        call = self.loss(keep_graph)
        return SampleLosses(call.losses, call)

    def _by_terms(self, keep_graph: bool) -> SampleLosses:
        """Return the losses by the graph of what the step returns."""
        trace = trace_of(self.pl_module, len(self.indices), keep_graph)
        with torch.enable_grad():
            with trace:
                output = self._run()
            terms = terms_of(trace, output, self._ways_out, self.memory.get("terms"))
        if "terms" not in self.memory:
            self.memory["terms"] = terms
            self.memory["kind"] = None if self.kind is None else self.kind()
        if not keep_graph:
            terms.release()
        return SampleLosses.of_terms(terms, self.memory["kind"])

    @property
    def _ways_out(self) -> str:
        names = self.memory.get("calls", [])
        named = f"Set loss=0 if {names[0]} alone shall count, or {self.way_out}." if names else ""
        return (
            f"{self.label} needs the loss of each sample. {named or self.way_out[0].upper() + self.way_out[1:] + '.'}"
        )

    def loss(self, keep_graph: bool = False) -> LossCall:
        """Run the step and return the call of its loss.

        Raises:
            SkippedBatchError: If the step returns nothing.
            RuntimeError: If no loss is seen, or only a part of it.
            ValueError: If ``outputs_fn`` does not return logits and labels.
        """
        if self.outputs_fn is not None:
            with torch.set_grad_enabled(keep_graph):
                check = not self.memory.get("labels_checked")
                self.memory["labels_checked"] = True
                return call_of(self.outputs_fn, self.pl_module, self.batch, len(self.indices), keep_graph, check)
        if self.which is None and "whole" not in self.memory:
            return self._whole_loss()
        which = self.which if self.which is not None else self.memory.get("which")
        capture = self._captured(keep_graph)
        several = len(capture.calls) + len(capture.unread) > 1
        if which is None and several and not any(call.has_graph for call in capture.calls):
            # Only with a graph the loss can be told from what a step computes for its log.
            found = self._captured(with_graph=True)
            which = self.memory["which"] = found.calls.index(self._only(found))
        return self._only(capture, which)

    def _whole_loss(self) -> LossCall:
        """Return the loss of the first batch that has one, after a look at what else the step's loss consists of."""
        return self._whole_call(*self._first_run())

    def _first_run(self) -> tuple[WholeLossCapture, object]:
        capture = WholeLossCapture(self.pl_module, len(self.indices), way_out=self.way_out)
        with torch.enable_grad(), capture:
            return capture, self._run()

    def _whole_call(self, capture: WholeLossCapture, output: object) -> LossCall:
        call = self._only(capture)
        refuse_rest(capture, call, output, self.label, self.way_out, self.by_classes)
        self.memory["whole"] = True
        if len(capture.calls) + len(capture.unread) > 1:
            self.memory["which"] = capture.calls.index(call)
        return call

    def _only(self, capture: LossCapture, which: int | None = None) -> LossCall:
        return only_loss(capture, self.label, which, self.by_classes)

    def _run(self) -> object:
        output = self.run()
        if output is None:
            raise SkippedBatchError
        return output

    def _captured(self, with_graph: bool) -> LossCapture:
        with_graph = with_graph or bool(self.memory.get("needs_graph"))
        capture = LossCapture(len(self.indices), keep_graph=with_graph, way_out=self.way_out)
        try:
            with torch.set_grad_enabled(with_graph), capture:
                self._run()
            return capture
        except RuntimeError:
            if with_graph:
                raise
        # A step that differentiates something itself, as a gradient penalty does, needs a graph.
        found = self._captured(with_graph=True)
        self.memory["needs_graph"] = True
        return found

    def gradient_norms(self) -> tuple[Tensor, SampleLosses]:
        """Return the norm of every sample's own gradient, and the losses."""
        if self.which is None and self.loss_fn is None and not self.memory.keys() & {"whole", "terms"}:
            self.losses()
        if "norms" not in self.memory:
            self.memory["norms"] = PerSampleGradientNorms(self.pl_module)
        found: list[SampleLosses] = []

        def losses() -> Tensor:
            found[:] = [self.losses(keep_graph=True)]
            return found[0].losses

        try:
            with torch.enable_grad():
                return self.memory["norms"](losses), found[0]
        except (RuntimeError, ValueError) as error:  # of the step, perhaps, so its words stay as they are
            error.add_note(f"{self.label} measured the gradient of each sample. Use another score, or {self.way_out}.")
            raise

    def features(self) -> tuple[Tensor, LossCall, nn.Linear]:
        """Return what the last linear layer takes in, the loss of what it gives out, and the layer.

        Raises:
            ValueError: If the logits are not the output of an ``nn.Linear``.
        """
        seen: list[tuple[nn.Linear, Tensor, Tensor]] = []
        layers = [layer for layer in self.pl_module.modules() if isinstance(layer, nn.Linear)]

        def see(layer: nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen.append((layer, args[0], output))

        hooks = [layer.register_forward_hook(see) for layer in layers]
        try:
            call = self.loss()
        finally:
            for hook in hooks:
                hook.remove()
        for layer, taken_in, output in reversed(seen):
            if isinstance(output, Tensor) and output.data_ptr() == call.input.data_ptr():
                return taken_in.detach(), call, layer
        raise ValueError(
            f"{self.label} needs the features of the last layer for this score, and the logits of "
            f"{type(self.pl_module).__name__} are not the output of an nn.Linear. Use another score, or {self.way_out}."
        )


def losses_of(loss_fn: LossFunction, pl_module: pl.LightningModule, batch: Any, samples: int) -> Tensor:
    """Return what ``loss_fn`` gives for a batch.

    Raises:
        ValueError: If that is not one loss for each sample.
    """
    return checked_losses(loss_fn(pl_module, batch), samples)


def checked_losses(found: Any, samples: int | None) -> Tensor:
    """Return what ``loss_fn`` gave.

    Raises:
        ValueError: If that is not one loss for each sample.
    """
    if (
        not isinstance(found, Tensor)
        or found.dim() != 1
        or samples not in (None, len(found))
        or not found.is_floating_point()
    ):
        raise ValueError(
            "loss_fn must return a tensor of real numbers with one loss for each sample of a batch, "
            f"({samples or 'B'},); got {_kind(found)}."
        )
    return found


def with_graph(losses: Tensor, label: str) -> Tensor:
    """Return losses of ``loss_fn``.

    Raises:
        ValueError: If they cannot be differentiated.
    """
    if not losses.requires_grad:
        raise ValueError(
            f"{label} differentiates what loss_fn returns, and that requires no gradient. Compute it from the module's "
            "outputs, without detach() or torch.no_grad()."
        )
    return losses


def _kind(found: Any) -> str:
    return f"{tuple(found.shape)} of {found.dtype}" if isinstance(found, Tensor) else type(found).__name__


def call_of(
    outputs_fn: LossFunction,
    pl_module: pl.LightningModule,
    batch: Any,
    samples: int,
    keep_graph: bool = False,
    check: bool = True,
) -> LossCall:
    """Return the cross-entropy of what ``outputs_fn`` gives for a batch.

    Args:
        outputs_fn: Gives logits and labels.
        pl_module: The module.
        batch: Its batch.
        samples: B.
        keep_graph: Keep the graph of the losses.
        check: Whether the labels are compared with the number of classes on a GPU too, which waits for it.

    Raises:
        ValueError: If that is not logits (B, C) and labels (B,).
    """
    found = outputs_fn(pl_module, batch)
    logits, labels = found if isinstance(found, (tuple, list)) and len(found) == 2 else (None, None)
    if (
        not isinstance(logits, Tensor)
        or not isinstance(labels, Tensor)
        or logits.dim() != 2
        or len(logits) != samples
        or not logits.is_floating_point()
        or labels.shape != (samples,)
        or labels.is_floating_point()
        or labels.is_complex()
    ):
        kinds = [_kind(each) for each in (found if isinstance(found, (tuple, list)) else [found])]
        raise ValueError(
            f"outputs_fn must return logits ({samples}, classes) and the labels as integers, ({samples},); got "
            f"{', '.join(kinds)}."
        )
    labels = labels.long()
    if check or labels.device.type == "cpu":
        _refuse_labels(labels, logits.shape[1])
    capture = LossCapture(samples, keep_graph=keep_graph)
    with capture:
        F.cross_entropy(logits, labels)
    return capture.only()


def _refuse_labels(labels: Tensor, classes: int) -> None:
    wrong = labels[(labels != _IGNORED) & ((labels < 0) | (labels >= classes))]
    if len(wrong):
        raise ValueError(
            f"outputs_fn must return the index of a class as each label, 0 to {classes - 1} for {classes} logits, or "
            f"{_IGNORED} for a sample without one; got {int(wrong[0])}."
        )


def refuse_other_means(
    pairs: list[tuple[float, float]],
    label: str,
    name: str,
    exactness: float,
    with_constant: bool = True,
    way_out: str = "",
) -> None:
    """Raise unless means are the losses of the step, or differ from them by one and the same constant.

    Args:
        pairs: The mean and the step's loss, for some batches.
        label: Who asks.
        name: What the means come from.
        exactness: Of the comparison, relative to the largest of them.
        with_constant: Whether a constant is allowed.
        way_out: What to do about it, as a clause that begins with a verb; by default to correct what gives the means.

    Raises:
        ValueError: If they do not.

    Example:
        >>> refuse_other_means([(1.0, 3.0), (2.0, 4.0)], "InfoBatch", "loss_fn", 1e-3)
        >>> refuse_other_means([(1.0, 3.0), (2.0, 3.0)], "InfoBatch", "loss_fn", 1e-3)
        Traceback (most recent call last):
        ...
        ValueError: InfoBatch takes loss_fn for the loss of each sample, and its mean over a batch is 1 and 2, where ...
    """
    differences = [mean - loss for mean, loss in pairs]
    if with_constant:
        differences = [one - differences[0] for one in differences]
    scale = max((abs(number) for pair in pairs for number in pair if math.isfinite(number)), default=0.0)
    if not all(abs(one) <= exactness * scale for one in differences):  # a mean that is not finite is none
        advice = f"Let {name} return the losses whose mean training_step returns."
        advice = f"{way_out[0].upper()}{way_out[1:]}." if way_out else advice
        means, losses = (" and ".join(f"{value:.6g}" for value in each) for each in zip(*pairs, strict=True))
        why = "the loss takes a mean or a scale over the batch that a sample alone does not have, or is another"
        rule = f"Both {'may differ by a constant only' if with_constant else 'must agree'}: {why}."
        if any(math.isfinite(loss) and not math.isfinite(mean) for mean, loss in pairs):
            rule = f"Some of what {name} gives is not finite."
        raise ValueError(
            f"{label} takes {name} for the loss of each sample, and its mean over a batch is {means}, where training_step "
            f"returns {losses}. {rule} {advice}"
        )
