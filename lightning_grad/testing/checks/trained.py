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
    """Raise unless all weights are finite, and some changed if they do without the callback."""
    for name, value in run.weights.items():
        if not torch.isfinite(value).all():
            raise GuaranteeError(f"After the fit, {name} is not finite.")
    if plain.moved and not run.moved:
        raise GuaranteeError("No weight changed in the fit.")


def assert_classes(run: Run, plain: Run, usual: Subject) -> None:
    """Raise unless the classes in the module are those of the run without a callback.

    Args:
        run: The run.
        plain: The run without a callback.
        usual: The callback without the feature. What it changes there too is left to G3.
    """
    changed = _changed(run, plain)
    if changed and (left := changed - _changed(usual.bare(), usual.plain.bare())):
        raise GuaranteeError(f"After the fit, {min(left)} has another class.")


def _changed(run: Run, plain: Run) -> set[str]:
    """Return the names of modules and parameters whose class is another than without a callback."""
    before, after = plain.traces["module"], run.traces["module"]
    return {name for name in before if before[name]["class"] != after.get(name, before[name])["class"]}


def assert_no_number_drawn(without: Run, run: Run) -> None:
    """Raise if a run took other random numbers than one without something."""
    if without.left["steps"] == run.left["steps"] and not torch.equal(without.left["random"], run.left["random"]):
        raise GuaranteeError(
            "It draws numbers from torch's global random generator, which changes those of the module."
        )


def replaces_optimizers(subject: Subject) -> bool:
    """Return whether it trains with optimizers of other classes than the module's, or parameters of its own."""
    names = (each.watched().watch.keys[0][1] for each in (subject, subject.plain))
    return (
        _optimizer_classes(subject.bare()) != _optimizer_classes(subject.plain.bare()) or len(set(map(len, names))) > 1
    )


def _optimizer_classes(run: Run) -> list[Any]:
    return [optimizer["class"] for optimizer in run.traces["trainer"]["optimizers"]]


def state_varies(subject: Subject) -> bool:
    """Return whether the state of the callback differs between two equal runs, like a time that was measured."""
    try:
        assert_identical(subject.bare().left["callbacks"], subject.run().left["callbacks"])
    except AssertionError:
        return True
    return False


def works_or_refuses(
    subject: Subject, arguments: Arguments = dict, change: Change = unchanged, usual: Subject | None = None
) -> str:
    """Raise unless the callback trains in a run with some feature, or refuses it before the first batch.

    Args:
        subject: The callback on a project.
        arguments: Function that returns arguments of the Trainer.
        change: Function that changes the module before the fit.
        usual: The same callback where a plain Trainer fits it, if ``subject`` needs another.

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
    assert_classes(run, plain, usual or subject)
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


def why_not_portable(subject: Subject) -> str:
    """Return why the weights of a checkpoint alone do not compute what was validated; empty if they do."""
    return next(filter(None, (getattr(callback, "why_not_portable", "") for callback in subject.built())), "")
