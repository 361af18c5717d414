"""The loss of an evaluation step, which need not return any: what it returns or, if nothing, what it computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_grad.core.losses.sample_losses import loss_of_output
from lightning_grad.functional import LossCapture
from lightning_grad.functional.plain_tensors import plain_tensor
from lightning_grad.utilities.batch_copies import copy_of

Step = Callable[[Any], Any]


@dataclass(frozen=True)
class StepLoss:
    """The loss of a step, with its graph.

    Args:
        total: The loss of the batch, a scalar; ``None`` if there is none.
        each: The loss of each sample, (B,); ``None`` if it is not seen.
        reason: Why it is not, where the step computes something that may be meant.
    """

    total: Tensor | None
    each: Tensor | None
    reason: str = ""


def run_for_loss(step: Step, batch: Any, samples: int, which: int | None) -> StepLoss:
    """Run a step on a batch and return its loss.

    Args:
        step: The step.
        batch: The batch.
        samples: Number of samples in it.
        which: Which of the losses that it computes; ``None`` for what it returns, or for the only one.
    """
    with LossCapture(samples, keep_graph=True) as capture:
        returned = loss_of_output(step(batch))
    each, reason = _each(capture, which)
    # Logits that are returned are no loss.
    returned = returned if returned is not None and returned.requires_grad and returned.numel() == 1 else None
    if (which is not None or returned is None) and each is not None:
        return StepLoss(each.sum(), each)
    return StepLoss(returned if which is None else None, each, reason)


def _each(capture: LossCapture, which: int | None) -> tuple[Tensor | None, str]:
    try:
        each = plain_tensor(capture.only(which).losses).nan_to_num()
    except (RuntimeError, ValueError) as error:
        seen = bool(capture.calls or capture.unread)
        return None, first_sentence(error) if seen else ""
    return (each, "") if each.requires_grad else (None, "its loss has no gradient")


def first_sentence(error: Exception) -> str:
    """Return what is wrong; what to do about it, in the words of the function that raised, does not apply here."""
    return str(error).partition(". ")[0].removesuffix(".")


def find_step(
    steps: Mapping[str, Step], batch: Any, samples: int, which: int | None, each: bool, needed_by: str
) -> str:
    """Return the name of the first step that has a loss.

    Args:
        steps: Steps by name.
        batch: A batch to try them on.
        samples: Number of samples in it.
        which: Which loss counts.
        each: Whether that of each sample is needed.
        needed_by: Who asks, for the error.

    Raises:
        RuntimeError: If none has.
    """
    reasons = []
    for name, step in steps.items():
        try:
            loss = run_for_loss(step, copy_of(batch), samples, which)  # a step may write into it
        except Exception as error:  # a training_step need not know what a validation loader yields
            reasons.append(f"{name} fails on its batch ({type(error).__name__}: {error})")
            continue
        if (loss.each if each else loss.total) is not None:
            return name
        reasons.append(f"{name} shows none{f' ({loss.reason})' if loss.reason else ''}")
    kind = "the loss of each sample, for several restarts" if each else "a loss to raise"
    raise RuntimeError(
        f"{needed_by} needs {kind}: {'; '.join(reasons)}. Compute it in {next(iter(steps))} by a loss of "
        f"torch.nn.functional{'' if each else ', or return it'}; of several, set loss=0 for the first."
    )
