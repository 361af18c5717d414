"""A technique's requirements on the losses of a step, and user functions that return losses or outputs instead."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as pl
from torch import Tensor
from torch.nn import functional as F

from lightning_grad.functional import LossCall, LossCapture

SCORE_FN = "set score_fn= to a function (module, batch) -> scores"
LOSS_FN = "set loss_fn= to a function (module, batch) -> loss of each sample"
OUTPUTS_FN = "set outputs_fn= to a function (module, batch) -> (logits, labels)"
_IGNORED = -100  # the label that cross_entropy ignores
GivenFunction = Callable[[pl.LightningModule, Any], Any]
SampleLoss = Literal["share", "own"] | None


@dataclass(frozen=True)
class LossRequest:
    """A technique's requirements on the losses of a step.

    Args:
        display_name: Name of the technique, for errors.
        loss_index: Index of the loss call to use. Default: the call whose mean the step returns.
        way_out: What to do if the loss cannot be captured, as an imperative without capital and
            full stop.
        loss_fn: Function (module, batch) -> losses of the samples, used instead of the step.
        outputs_fn: Function (module, batch) -> (logits, labels), used instead of the step.
        by_classes: Whether only logits and classes matter; other terms may then be added to the
            classification loss.
        kind: Returns how to define the loss of a sample if it comes from several terms.
    """

    display_name: str = "The score"
    loss_index: int | None = None
    way_out: str = SCORE_FN
    loss_fn: GivenFunction | None = None
    outputs_fn: GivenFunction | None = None
    by_classes: bool = False
    kind: Callable[[], SampleLoss] = lambda: None

    @property
    def advice(self) -> str:
        """The advice, as a sentence."""
        return f"{self.way_out[0].upper()}{self.way_out[1:]}."

    def needs_losses(self, call: str = "") -> str:
        """Return the end of a refusal: the technique that needs the losses, and what to do.

        Args:
            call: Name of a loss call that could be used alone, if there is one.
        """
        advice = f"Set loss_index=0 to use {call} alone, or {self.way_out}." if call else self.advice
        return f"{self.display_name} needs the loss of each sample. {advice}"


ANY_LOSS = LossRequest()


def checked_losses(found: Any, samples: int | None) -> Tensor:
    """Return the result of ``loss_fn`` for a batch after checking it.

    Raises:
        ValueError: If it is not one loss for each sample.
    """
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.shape != (samples or found.numel(),):
        raise ValueError(
            "loss_fn must return a floating-point tensor with one loss for each sample, of shape "
            f"({samples or 'B'},); got {_kind(found)}."
        )
    return found


def with_graph(losses: Tensor, display_name: str) -> Tensor:
    """Return the losses of ``loss_fn`` after checking that they have a graph.

    Raises:
        ValueError: If they require no gradient.
    """
    if not losses.requires_grad:
        raise ValueError(
            f"{display_name} differentiates the losses of loss_fn, but they require no gradient. Compute them from the "
            "module's outputs, without detach() or torch.no_grad()."
        )
    return losses


def _kind(found: Any) -> str:
    return f"{tuple(found.shape)} of {found.dtype}" if isinstance(found, Tensor) else type(found).__name__


def _fit(logits: Tensor, labels: Tensor, samples: int) -> bool:
    are_classes = not labels.is_floating_point() and not labels.is_complex() and labels.shape == (samples,)
    return are_classes and logits.is_floating_point() and logits.dim() == 2 and len(logits) == samples


def call_of(found: Any, samples: int, keep_graph: bool = False, check: bool = True) -> LossCall:
    """Return the cross-entropy of the logits and labels that ``outputs_fn`` returned for a batch.

    Args:
        found: Result of ``outputs_fn``.
        samples: B, the number of samples.
        keep_graph: Keep the graph of the losses.
        check: Whether to check the range of labels on a GPU too, which syncs with the host.

    Raises:
        ValueError: If ``found`` is not logits (B, C) and labels (B,).
    """
    logits, labels = found if isinstance(found, (tuple, list)) and len(found) == 2 else (None, None)
    if not isinstance(logits, Tensor) or not isinstance(labels, Tensor) or not _fit(logits, labels, samples):
        kinds = [_kind(each) for each in (found if isinstance(found, (tuple, list)) else [found])]
        raise ValueError(
            f"outputs_fn must return logits ({samples}, classes) and integer labels ({samples},); got "
            f"{', '.join(kinds)}."
        )
    labels = labels.long()
    if check or labels.device.type == "cpu":
        classes = logits.shape[1]
        wrong = labels[(labels != _IGNORED) & ((labels < 0) | (labels >= classes))]
        if len(wrong):
            raise ValueError(
                f"outputs_fn must return labels from 0 to {classes - 1} for {classes} logits, or {_IGNORED} for a "
                f"sample without a label; got {int(wrong[0])}."
            )
    capture = LossCapture(samples, keep_graph=keep_graph)
    with capture:
        F.cross_entropy(logits, labels)
    return capture.only()


def refuse_other_means(
    pairs: list[tuple[float, float]],
    display_name: str,
    name: str,
    exactness: float,
    with_constant: bool = True,
    advice: str = "",
) -> None:
    """Raise unless means equal the losses of the step, or differ from them by a constant.

    Args:
        pairs: Mean and step loss of some batches.
        display_name: Name of the technique.
        name: Source of the means.
        exactness: Relative tolerance of the comparison.
        with_constant: Whether the means may differ by a constant.
        advice: What to do, as a sentence. Default: correct the source of the means.

    Raises:
        ValueError: If they differ.

    Example:
        >>> refuse_other_means([(1.0, 3.0), (2.0, 4.0)], "InfoBatch", "loss_fn", 1e-3)
        >>> refuse_other_means([(1.0, 3.0), (2.0, 3.0)], "InfoBatch", "loss_fn", 1e-3)
        Traceback (most recent call last):
        ...
        ValueError: InfoBatch takes the loss of each sample from loss_fn, but its mean over a batch is 1 and 2, while ...
    """
    differences = [mean - loss for mean, loss in pairs]
    if with_constant:
        differences = [one - differences[0] for one in differences]
    scale = max((abs(number) for pair in pairs for number in pair if math.isfinite(number)), default=0.0)
    if not all(abs(one) <= exactness * scale for one in differences):  # written so that nan fails too
        advice = advice or f"Make {name} return the losses whose mean training_step returns."
        means, losses = (" and ".join(f"{value:.6g}" for value in each) for each in zip(*pairs, strict=True))
        why = (
            "The loss uses a mean or a scale over the batch that a single sample does not have, or it is another loss."
        )
        rule = f"The two {'may differ only by a constant' if with_constant else 'must be equal'}. {why}"
        if any(math.isfinite(loss) and not math.isfinite(mean) for mean, loss in pairs):
            rule = f"Some losses of {name} are not finite."
        raise ValueError(
            f"{display_name} takes the loss of each sample from {name}, but its mean over a batch is {means}, while "
            f"training_step returns {losses}. {rule} {advice}"
        )
