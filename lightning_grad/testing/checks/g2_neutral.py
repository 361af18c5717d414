"""G2: at its neutral setting the callback changes nothing."""

from __future__ import annotations

from typing import Any

from lightning_grad.testing.checks.registry import GuaranteeError, check
from lightning_grad.testing.checks.trained import assert_no_number_drawn
from lightning_grad.testing.runs import Run
from lightning_grad.testing.states import assert_identical
from lightning_grad.testing.subject import NotApplicableError, RefusedError, Subject


@check("quick")
def g2_neutral_is_identity(subject: Subject) -> None:
    """With the neutral setting, weights, optimizers, random streams and metrics are bitwise those of a run without it."""
    _assert_neutral(subject, accumulate=1)


@check("full")
def g2_neutral_with_accumulation(subject: Subject) -> None:
    """The same with gradients accumulated over three batches."""
    _assert_neutral(subject, accumulate=3)


def _assert_neutral(subject: Subject, accumulate: int) -> None:
    if not callable(subject.neutral):
        raise NotApplicableError(subject.neutral or "No neutral= was given.")
    try:
        neutral = subject.run_or_refuse([subject.neutral()], accumulate_grad_batches=accumulate)
    except RefusedError as refusal:
        if accumulate == 1:
            raise GuaranteeError(f"The neutral setting refuses an ordinary fit: {refusal}") from refusal.__cause__
        raise
    plain = subject.plain.bare(accumulate)
    assert_no_number_drawn(plain, neutral)
    assert_identical(compared(plain, plain), compared(neutral, plain))


def compared(run: Run, plain: Run) -> dict[str, Any]:
    """Return what must be bitwise the same as in the run without the callback, except what only the callback logs."""
    metrics = {key: value for key, value in run.metrics.items() if key in plain.metrics}
    return {**{key: value for key, value in run.left.items() if key != "callbacks"}, "metrics": metrics}
