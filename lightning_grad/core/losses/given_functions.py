"""What a technique asks of the losses of a step, and functions of users that give losses or outputs in the step's place."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as pl
from torch import Tensor
from torch.nn import functional as F

from lightning_grad.functional import LossCall, LossCapture

SCORE_FN = "give score_fn= in place of a score: it takes the module and a batch, and returns the scores"
LOSS_FN = "give loss_fn=, which takes the module and a batch, and returns the loss of each sample"
OUTPUTS_FN = "give outputs_fn=, which takes the module and a batch, and returns logits and labels"
_IGNORED = -100  # by cross_entropy
GivenFunction = Callable[[pl.LightningModule, Any], Any]
SampleLoss = Literal["share", "own"] | None


@dataclass(frozen=True)
class LossRequest:
    """What a technique asks of the losses of a step: which, from where, and how errors name it.

    Args:
        display_name: Who asks, for errors.
        loss_index: Index of the only loss call that counts; by default the one whose mean the step returns.
        way_out: What to do about a loss that cannot be seen, as a clause that begins with a verb.
        loss_fn: Gives the losses of the samples in place of the step.
        outputs_fn: Gives logits and labels in place of the step.
        by_classes: Whether only logits and classes matter, so that other terms may be added to the loss that classifies.
        kind: Returns what the loss of a sample is where it comes from several terms.
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
        """The way out, as a sentence."""
        return f"{self.way_out[0].upper()}{self.way_out[1:]}."

    def needs_losses(self, call: str = "") -> str:
        """Return what a refusal adds: who needs the losses, and what to do.

        Args:
            call: A loss that could count alone, if there is one.
        """
        advice = f"Set loss_index=0 if {call} alone shall count, or {self.way_out}." if call else self.advice
        return f"{self.display_name} needs the loss of each sample. {advice}"


ANY_LOSS = LossRequest()


def checked_losses(found: Any, samples: int | None) -> Tensor:
    """Return what ``loss_fn`` has returned for a batch.

    Raises:
        ValueError: If that is not one loss for each sample.
    """
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.shape != (samples or found.numel(),):
        raise ValueError(
            "loss_fn must return a tensor of real numbers with one loss for each sample of a batch, "
            f"({samples or 'B'},); got {_kind(found)}."
        )
    return found


def with_graph(losses: Tensor, display_name: str) -> Tensor:
    """Return losses of ``loss_fn``.

    Raises:
        ValueError: If they cannot be differentiated.
    """
    if not losses.requires_grad:
        raise ValueError(
            f"{display_name} differentiates what loss_fn returns, and that requires no gradient. Compute it from the module's "
            "outputs, without detach() or torch.no_grad()."
        )
    return losses


def _kind(found: Any) -> str:
    return f"{tuple(found.shape)} of {found.dtype}" if isinstance(found, Tensor) else type(found).__name__


def _fit(logits: Tensor, labels: Tensor, samples: int) -> bool:
    are_classes = not labels.is_floating_point() and not labels.is_complex() and labels.shape == (samples,)
    return are_classes and logits.is_floating_point() and logits.dim() == 2 and len(logits) == samples


def call_of(found: Any, samples: int, keep_graph: bool = False, check: bool = True) -> LossCall:
    """Return the cross-entropy of what ``outputs_fn`` has returned for a batch.

    Args:
        found: Logits and labels.
        samples: B.
        keep_graph: Keep the graph of the losses.
        check: Whether the labels are compared with the number of classes on a GPU too, which waits for it.

    Raises:
        ValueError: If that is not logits (B, C) and labels (B,).
    """
    logits, labels = found if isinstance(found, (tuple, list)) and len(found) == 2 else (None, None)
    if not isinstance(logits, Tensor) or not isinstance(labels, Tensor) or not _fit(logits, labels, samples):
        kinds = [_kind(each) for each in (found if isinstance(found, (tuple, list)) else [found])]
        raise ValueError(
            f"outputs_fn must return logits ({samples}, classes) and the labels as integers, ({samples},); got "
            f"{', '.join(kinds)}."
        )
    labels = labels.long()
    if check or labels.device.type == "cpu":
        classes = logits.shape[1]
        wrong = labels[(labels != _IGNORED) & ((labels < 0) | (labels >= classes))]
        if len(wrong):
            raise ValueError(
                f"outputs_fn must return the index of a class as each label, 0 to {classes - 1} for {classes} logits, or "
                f"{_IGNORED} for a sample without one; got {int(wrong[0])}."
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
    """Raise unless means are the losses of the step, or differ from them by one and the same constant.

    Args:
        pairs: The mean and the step's loss, for some batches.
        display_name: Who asks.
        name: What the means come from.
        exactness: Of the comparison, relative to the largest of them.
        with_constant: Whether a constant is allowed.
        advice: What to do about it, as a sentence; by default to correct what gives the means.

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
        advice = advice or f"Let {name} return the losses whose mean training_step returns."
        means, losses = (" and ".join(f"{value:.6g}" for value in each) for each in zip(*pairs, strict=True))
        why = "the loss takes a mean or a scale over the batch that a sample alone does not have, or is another"
        rule = f"Both {'may differ by a constant only' if with_constant else 'must agree'}: {why}."
        if any(math.isfinite(loss) and not math.isfinite(mean) for mean, loss in pairs):
            rule = f"Some of what {name} gives is not finite."
        raise ValueError(
            f"{display_name} takes {name} for the loss of each sample, and its mean over a batch is {means}, where "
            f"training_step returns {losses}. {rule} {advice}"
        )
