"""The loss that a step returns, which of its calls classifies, and refusing a step whose loss is seen only in part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

from torch import Tensor

from lightning_grad.core.row_order import are_all_positions
from lightning_grad.functional import LossCall, LossCapture
from lightning_grad.functional.gradients import WholeLossCapture
from lightning_grad.functional.gradients.loss_functions import OF_CLASS_INDICES
from lightning_grad.functional.plain_tensors import plain_tensor


def refuse_rest(
    capture: WholeLossCapture, call: LossCall, output: object, label: str, way_out: str, by_classes: bool = False
) -> None:
    """Raise if what a step returns is more than the mean of one loss.

    A factor that is the same for all samples does not count, nor do terms that do not depend on samples.

    Args:
        capture: What was seen of the step.
        call: Its loss.
        output: What it returned.
        label: Who asks, for errors.
        way_out: What to do about it, as a clause that begins with a verb.
        by_classes: Whether only the logits and classes of the call matter. Then other terms may be added to it.

    Raises:
        RuntimeError: If it is.
    """
    loss = loss_of_output(output)
    if loss is None or loss.numel() != 1:
        refuse_loss(loss, f"{label} needs the loss of each sample. {way_out[0].upper()}{way_out[1:]}.")
    rest = capture.missing_in(loss, call) if by_classes and call.has_class_indices else capture.rest_of(loss, call)
    if rest is None:
        return
    index = capture.calls.index(call)
    if by_classes and call.has_class_indices:
        raise RuntimeError(
            f"{label} takes logits and classes from {call.name}, and training_step does not train on all of them: {rest}. "
            f"Set loss={index} to use them all the same, or {way_out}."
        )
    raise RuntimeError(
        f"{label} sees {call.name}, which is not all that training_step returns: {rest}. It would take a part "
        f"of the loss for the whole. Set loss={index} if {call.name} alone shall count, or {way_out}."
    )


def classifying(capture: LossCapture) -> int | None:
    """Return the index of the only call that classifies; ``None`` if there is none, or more than one.

    A contrastive loss, whose classes are the places of the rows in the batch, is not counted next to another. Seeing that
    waits for the device.
    """
    if any(unread.has_graph and unread.name.startswith(OF_CLASS_INDICES) for unread in capture.unread):
        return None
    found = [i for i, call in enumerate(capture.calls) if call.has_graph and call.has_class_indices]
    if len(found) > 1:
        found = [i for i in found if not are_all_positions(capture.calls[i])]
    return found[0] if len(found) == 1 else None


def trained_loss(output: object, ways_out: str) -> Tensor:
    """Return the loss in what a step returned.

    Args:
        output: What the step returned.
        ways_out: What a refusal adds: who needs the loss, and what to do, as whole sentences.

    Raises:
        ValueError: If it is not one number that is trained by.
    """
    loss = loss_of_output(output)
    if loss is None or loss.numel() != 1 or loss.grad_fn is None:
        refuse_loss(loss, ways_out)
    return loss


def refuse_loss(loss: Tensor | None, ways_out: str) -> NoReturn:
    """Raise, because a step returned no loss, or something else as its loss."""
    graph = "" if loss is None else f", which requires {'no gradient' if loss.grad_fn is None else 'a gradient'}"
    found = "no loss" if loss is None else f"a loss {tuple(loss.shape)}{graph}"
    raise ValueError(f"training_step must return one number that is trained by; got {found}. {ways_out}")


def loss_of_output(output: object) -> Tensor | None:
    """Return the loss in what a step returned, if it is there, as a plain tensor."""
    loss = output.get("loss") if isinstance(output, Mapping) else output
    return plain_tensor(loss) if isinstance(loss, Tensor) else None
