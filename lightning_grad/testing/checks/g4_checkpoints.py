"""G4: every checkpoint loads into the plain module, and computes what was validated."""

from __future__ import annotations

import importlib
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_grad.testing.checks.registry import GuaranteeError, check
from lightning_grad.testing.checks.trained import assert_trained, replaces_optimizers, why_not_portable
from lightning_grad.testing.lines import line_of_class
from lightning_grad.testing.rows import REFUSES
from lightning_grad.testing.states import assert_identical
from lightning_grad.testing.subject import NotApplicableError, RefusedError, Subject
from lightning_grad.testing.watching import Outputs


@check("quick")
def g4_state_dict_keys_in_a_fit(subject: Subject) -> str:
    """During a fit the module has the keys and parameters of the plain module, in the same order.

    The callback may add parameters of its own that are not in the state dict.
    """
    plain_keys, plain_names = subject.plain.watched().watch.keys[0]
    own: list[str] = []
    for keys, names in subject.watched().watch.keys:
        own = [name for name in names if name not in plain_names]
        kept = [name for name in names if name in plain_names]
        if keys != plain_keys or kept != plain_names:
            other = sorted({*keys, *kept} ^ {*plain_keys, *plain_names})
            raise GuaranteeError(
                f"state_dict() and named_parameters() differ from the plain module's: {other or 'their order'}"
            )
    return f"It trains parameters of its own, which are not in the state dict, such as {own[0]}." if own else ""


@check("quick")
def g4_checkpoint_loads_by_default(subject: Subject) -> None:
    """``torch.load`` reads checkpoints with ``weights_only=True``, as Lightning does."""
    for path in subject.watched().saved("epochs").values():
        try:
            torch.load(path, weights_only=True)
        except Exception as error:
            line = line_of_class(subject.kind, "state_dict", "on_save_checkpoint")
            raise GuaranteeError(f"{_refused_part(path) or error}", line) from error


def _refused_part(path: Path) -> str:
    """Return words that name the part that ``weights_only=True`` refuses; empty if it refuses no single part."""
    part, where = torch.load(path, weights_only=False), ""
    while isinstance(part, dict):
        refused = [key for key, value in part.items() if not _loads_by_default(value)]
        if not refused:
            break
        part, where = part[refused[0]], f"{where}[{refused[0]!r}]"
    kind = part if isinstance(part, type) else type(part)
    what = f"{'the class' if part is kind else 'an object of'} {kind.__module__}.{kind.__qualname__}"
    return where and f"weights_only=True refuses checkpoint{where}, which holds {what}."


def _loads_by_default(value: Any) -> bool:
    with io.BytesIO() as file:
        torch.save(value, file)
        file.seek(0)
        try:
            torch.load(file, weights_only=True)
        except Exception:
            return False
    return True


@check("quick")
def g4_checkpoint_computes_what_was_validated(subject: Subject) -> None:
    """Each epoch's checkpoint loads strictly into the plain module, which then computes bitwise what was validated."""
    watched = subject.watched()
    assert_as_validated(subject, watched.saved("epochs"), watched.watch.of)


@check("full")
def g4_other_checkpoints_hold_the_same_weights(subject: Subject) -> None:
    """Checkpoints with ``save_weights_only=True`` and ``last.ckpt`` hold the weights of the epoch's checkpoint."""
    watched = subject.watched()
    epochs = watched.saved("epochs")
    others = {**watched.saved("weights"), max(epochs): watched.folder / "epochs" / "last.ckpt"}
    for step, path in [*watched.saved("weights").items(), *others.items()]:
        assert_identical(_weights(epochs[step]), _weights(path), f"{path.parent.name}/{path.name}")


@check("full")
def g4_checkpoint_on_exception(subject: Subject) -> None:
    """Checkpoints that an exception leads to, also one saved by hand, hold the weights that another has at that step."""
    broken, saved = subject.broken("exception"), subject.watched().saved("steps")
    step = broken.left["steps"]
    if step not in saved:
        raise NotApplicableError(f"No checkpoint was saved at step {step}.")
    missing = sorted({"on_exception", "full", "weights", "by_hand"} - broken.saved.keys())
    if missing:
        raise GuaranteeError(f"An exception leads to no checkpoint {missing}: saving it fails.")
    for who, checkpoint in sorted(broken.saved.items()):
        assert_identical(_weights(saved[step]), dict(checkpoint["state_dict"]), who)


@check("full", feature="weight_averaging")
def g4_with_weight_averaging(subject: Subject) -> str:
    """With Lightning's EMA, in either order, checkpoints hold what was validated, and the final weights are the same."""
    averaging = getattr(importlib.import_module("lightning.pytorch.callbacks"), "EMAWeightAveraging", None)
    if averaging is None:
        raise NotApplicableError("This Lightning has no EMAWeightAveraging.")
    ends: list[Any] = []
    for ema_first in (False, True):
        callbacks = [*subject.built(), averaging(decay=0.8)]
        try:
            run = subject.run_and_save(callbacks[::-1] if ema_first else callbacks, ["epochs"], copying=False)
        except RefusedError as refusal:
            return f"{REFUSES}{refusal}"
        assert_as_validated(subject, run.saved("epochs"), run.watch.of)
        ends.append(run.weights)
    assert_identical(ends[0], ends[1], "weights in the other order of the callbacks")
    return ""


@check("full")
def g4_a_run_without_it_continues(subject: Subject) -> None:
    """A run without it resumes from its checkpoint, unless that holds the state of other optimizers or parameters."""
    if replaces_optimizers(subject):
        raise NotApplicableError("It trains other parameters or optimizers, whose state the module's cannot load.")
    subject.plain.run(ckpt=_half_way(subject))


@check("full")
def g4_continues_a_run_without_it(subject: Subject) -> str:
    """A run with it resumes from the checkpoint of a run without it; with other optimizers or parameters, it may refuse."""
    path = _half_way(subject.plain)
    try:
        run = subject.run_or_refuse(subject.built(), ckpt=path)
    except RefusedError as refusal:
        if not replaces_optimizers(subject):
            raise GuaranteeError(str(refusal)) from refusal
        return f"It refuses the state of the module's optimizers: {refusal}"
    assert_trained(run, subject.plain.bare())
    return ""


def _half_way(subject: Subject) -> Path:
    paths = list(subject.watched().saved("epochs").values())
    return paths[(len(paths) - 1) // 2]


def _weights(path: Path) -> dict[str, Tensor]:
    return dict(torch.load(path, weights_only=False)["state_dict"])


def assert_as_validated(subject: Subject, paths: dict[int, Path], validated: dict[int, list[Tensor]]) -> None:
    """Raise unless checkpoints load strictly into the plain module, and its children then return what was validated.

    Args:
        subject: The callback on a project.
        paths: The checkpoints by their step.
        validated: What the children of the module returned in validation, by step.

    Raises:
        NotApplicableError: If nothing was validated.
        GuaranteeError: If there is no checkpoint.
    """
    if reason := why_not_portable(subject):
        raise NotApplicableError(reason)
    if not any(validated.values()):
        raise NotApplicableError("The module has no validation, or its children return no tensors there.")
    if not paths:
        raise GuaranteeError("Lightning saved no checkpoint.")
    built, outputs = subject.project.make(), Outputs()
    for step, path in paths.items():
        built.module.load_state_dict(_weights(path), strict=True)
        subject.validate(built, [outputs])
        where = f"what the plain module computes with {path.name}"
        assert_identical(_without_additions(validated[step], outputs.of[0]), outputs.of[0], where)


def _without_additions(outputs: list[Tensor], wanted: list[Tensor]) -> list[Tensor]:
    """Drop what a callback computed in addition: if all wanted outputs are there in their order, return only these."""
    left = iter(outputs)
    found = all(any(torch.equal(output, each) for output in left) for each in wanted)
    return wanted if found and len(outputs) > len(wanted) else outputs
