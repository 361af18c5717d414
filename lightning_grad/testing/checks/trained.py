"""Whether a callback trains a module in a run with some feature, or refuses it before the first batch."""

from __future__ import annotations

from typing import Any

import torch

from lightning_grad.testing.checks.registry import GuaranteeError
from lightning_grad.testing.rows import REFUSES
from lightning_grad.testing.runs import Run
from lightning_grad.testing.states import assert_identical
from lightning_grad.testing.subject import Arguments, Change, NotApplicableError, RefusedError, Subject, unchanged


def assert_trained(run: Run, plain: Run) -> None:
    """Raise unless all weights are finite and all classes in the module are those of the run without a callback."""
    for name, value in run.weights.items():
        if not torch.isfinite(value).all():
            raise GuaranteeError(f"After the fit, {name} is not finite.")
    if plain.moved and not run.moved:
        raise GuaranteeError("No weight changed in the fit.")
    assert_identical(_classes(plain), _classes(run), "after the fit: ")


def _classes(run: Run) -> dict[str, Any]:
    return {name: trace["class"] for name, trace in run.traces["module"].items()}


def works_or_refuses(subject: Subject, arguments: Arguments = dict, change: Change = unchanged) -> str:
    """Raise unless the callback trains in a run with some feature, or refuses it before the first batch.

    Args:
        subject: The callback on a project.
        arguments: Function that returns arguments of the Trainer.
        change: Function that changes the module before the fit.

    Returns:
        str: The refusal; empty if it trains.

    Raises:
        NotApplicableError: If the module does not train so without the callback.
        GuaranteeError: If the result of the fit is wrong.
    """
    plain = premise(subject, arguments, change)
    try:
        run = subject.situated(arguments, change)
    except RefusedError as refusal:
        return f"{REFUSES}{refusal}"
    assert_trained(run, plain)
    return ""


def premise(subject: Subject, arguments: Arguments = dict, change: Change = unchanged) -> Run:
    """Return the run without a callback.

    Raises:
        NotApplicableError: If it fails.
    """
    try:
        return subject.plain.situated(arguments, change)
    except (Exception, RefusedError) as error:
        if isinstance(error, NotApplicableError):
            raise
        words = str(error.__cause__ or error).strip().split("\n")[0]
        raise NotApplicableError(f"The module itself does not train so: {words}") from error
