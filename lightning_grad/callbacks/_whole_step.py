"""Refusing a step whose loss is seen only in part."""

from __future__ import annotations

from lightning_grad.callbacks._sample_losses import loss_of
from lightning_grad.functional import LossCall
from lightning_grad.functional._whole_loss import WholeLossCapture


def refuse_rest(capture: WholeLossCapture, call: LossCall, output: object, label: str, way_out: str) -> None:
    """Raise if what a step returns is more than the mean of one loss.

    A factor that is the same for all samples, and terms that do not depend on them, are no more.

    Raises:
        RuntimeError: If it is.
    """
    loss = loss_of(output)
    rest = None if loss is None else capture.rest_of(loss, call)
    if rest is None:
        return
    index = capture.calls.index(call)
    raise RuntimeError(
        f"{label} sees {call.name}, which is not all that training_step returns: {rest}. It would take a part "
        f"of the loss for the whole. Set loss={index} if {call.name} alone shall count, or {way_out}."
    )
