"""The loss that a step returns, and refusing a step whose loss is seen only in part."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lightning_grad.functional import LossCall
from lightning_grad.functional.gradients import WholeLossCapture
from lightning_grad.functional.plain_tensors import plain_tensor


def refuse_rest(capture: WholeLossCapture, call: LossCall, output: object, label: str, way_out: str) -> None:
    """Raise if what a step returns is more than the mean of one loss.

    A factor that is the same for all samples does not count, nor do terms that do not depend on samples.

    Raises:
        RuntimeError: If it is.
    """
    loss = loss_of_output(output)
    rest = None if loss is None else capture.rest_of(loss, call)
    if rest is None:
        return
    index = capture.calls.index(call)
    raise RuntimeError(
        f"{label} sees {call.name}, which is not all that training_step returns: {rest}. It would take a part "
        f"of the loss for the whole. Set loss={index} if {call.name} alone shall count, or {way_out}."
    )


def loss_of_output(output: object) -> Tensor | None:
    """Return the loss in what a step returned, if it is there, as a plain tensor."""
    loss = output.get("loss") if isinstance(output, Mapping) else output
    return plain_tensor(loss) if isinstance(loss, Tensor) else None
