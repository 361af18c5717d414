"""G5: a run that stops and resumes is bitwise the uninterrupted run, wherever that holds without the callback."""

from __future__ import annotations

from typing import Any

from lightning_grad.testing.checks.registry import GuaranteeError, check
from lightning_grad.testing.checks.trained import assert_no_number_drawn, state_varies
from lightning_grad.testing.lines import line_of_class
from lightning_grad.testing.runs import Run
from lightning_grad.testing.states import assert_identical
from lightning_grad.testing.subject import NotApplicableError, Subject


@check("quick")
def g5_saving_changes_nothing(subject: Subject) -> str:
    """A run that is saved at every second step ends bitwise like one that is not."""
    bare, watched = subject.bare(), subject.watched()
    assert_no_number_drawn(bare, watched)
    return _compare(subject, bare, watched, "")


@check("quick")
def g5_resumes_within_an_epoch(subject: Subject) -> str:
    """A run that resumes from a checkpoint within an epoch ends bitwise like the uninterrupted run."""
    return _resume(subject, "steps", slice(1, -1, 3))


@check("quick")
def g5_resumes_at_an_epochs_end(subject: Subject) -> str:
    """The same from the checkpoint of each epoch but the last."""
    return _resume(subject, "epochs", slice(None, -1))


@check("full")
def g5_resumes_with_accumulation(subject: Subject) -> str:
    """The same within an epoch, with gradients accumulated over two batches."""
    return _resume(subject, "steps", slice(1, -1, 3), accumulate=2)


@check("full")
def g5_resumes_after_exceptions(subject: Subject) -> str:
    """A run that two exceptions end, and that resumes from what each saved, ends bitwise like the uninterrupted run."""
    steps = max(subject.middle() // 4, 1), subject.middle()
    whole, plain = subject.bare(), subject.plain
    if _differ(plain.bare(), plain.continued(steps)):
        raise NotApplicableError(_INEXACT)
    return _compare(subject, whole, subject.continued(steps), f"after exceptions at steps {steps[0]} and {steps[1]}: ")


_INEXACT = "Without the callback, too, the resumed run differs: of dropout, a shuffled loader, or one without a state."


def _resume(subject: Subject, kind: str, chosen: slice, accumulate: int = 1) -> str:
    """Raise unless the run resumes bitwise from checkpoints where the run without a callback does."""
    whole, plain = subject.watched(accumulate), subject.plain
    words = None
    for index, path in list(enumerate(whole.saved(kind).values()))[chosen]:
        if not resumes_without(plain, kind, index, accumulate):
            continue
        resumed = subject.run(ckpt=path, accumulate_grad_batches=accumulate)
        words = _compare(subject, whole, resumed, f"resumed at {path.stem}: ")
    if words is None:
        raise NotApplicableError(_INEXACT)
    return words


def resumes_without(plain: Subject, kind: str, index: int, accumulate: int) -> bool:
    """Return whether the run without a callback resumes bitwise from the checkpoint with this index."""
    try:
        return not _differ(plain.watched(accumulate), plain.resumed(kind, index, accumulate))
    except IndexError:  # it is a run of another length
        return False


def _differ(whole: Run, resumed: Run, *ignored: str) -> bool:
    try:
        assert_identical(_comparable(whole, *ignored), _comparable(resumed, *ignored))
    except AssertionError:
        return True
    return False


def _compare(subject: Subject, whole: Run, resumed: Run, where: str) -> str:
    """Raise unless two runs ended the same; return what was not compared, or nothing."""
    try:
        assert_identical(_comparable(whole), _comparable(resumed), where)
    except AssertionError as error:
        if not _differ(whole, resumed, "callbacks") and state_varies(subject):
            return "Its state was not compared, because it differs between two equal runs."
        raise GuaranteeError(str(error), line_of_class(subject.kind, "state_dict", "load_state_dict")) from error
    return ""


def _comparable(run: Run, *ignored: str) -> dict[str, Any]:
    """Lightning restores no random state."""
    return {key: value for key, value in run.left.items() if key not in ("random", *ignored)}
