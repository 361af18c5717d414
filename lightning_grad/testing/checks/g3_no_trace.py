"""G3: after a fit nothing of the callback is left, and it can be copied and used again."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lightning_grad.testing.checks.registry import GuaranteeError, check
from lightning_grad.testing.checks.trained import state_varies, why_not_portable
from lightning_grad.testing.lines import line_of_class, line_of_function
from lightning_grad.testing.runs import Run
from lightning_grad.testing.states import assert_identical
from lightning_grad.testing.subject import NotApplicableError, Subject
from lightning_grad.testing.traces import hooks_and_methods
from lightning_grad.testing.watching import without_links


@check("quick")
def g3_no_trace_after_success(subject: Subject) -> None:
    """After a fit no hook, patched method, changed class, attribute or buffer is left, and the module pickles."""
    assert_nothing_is_left(subject.bare(), subject.plain.bare())


@check("quick")
def g3_no_trace_after_an_exception(subject: Subject) -> None:
    """The same after a fit that an exception ended in mid-epoch."""
    assert_nothing_is_left(subject.broken("exception"), subject.plain.broken("exception"))


@check("full")
def g3_no_trace_after_ctrl_c(subject: Subject) -> None:
    """The same after Ctrl-C, which ends the fit with SystemExit."""
    assert_nothing_is_left(subject.broken("interrupt"), subject.plain.broken("interrupt"))


@check("full")
def g3_no_trace_after_a_failed_start(subject: Subject) -> None:
    """The same after an exception in ``on_fit_start`` of a callback that comes later in the list."""
    run, plain = subject.broken("in on_fit_start"), subject.plain.broken("in on_fit_start")
    run = copy.copy(run)
    run.traces = {**run.traces, "trainer": _as_before_training(run, plain, subject.plain.bare())}
    assert_nothing_is_left(run, plain)


def _as_before_training(run: Run, plain: Run, whole: Run) -> dict[str, Any]:
    """Return the traces on the trainer without what every fit sets up: a callback may train before the fit does."""
    found, before, after = (some.traces["trainer"] for some in (run, plain, whole))
    attributes = [name for name in found["trainer"] if name in before["trainer"] or name not in after["trainer"]]
    loader = before["loader"] if found["loader"] == after["loader"] else found["loader"]
    return {**found, "trainer": attributes, "loader": loader}


def assert_nothing_is_left(run: Run, plain: Run) -> None:
    """Raise unless module and trainer look as after the run without a callback, and the module's children pickle."""
    before, after = _without_replaced(plain, run), _without_replaced(run, plain)
    try:
        assert_identical(before, after, "left behind in ")
    except AssertionError as error:
        raise GuaranteeError(*_with_owner(run.module, str(error))) from error
    for name, child in plain.module.named_children():
        if _pickles(child) and not _pickles(run.module.get_submodule(name)):
            raise GuaranteeError(f"{name} of the module does not pickle after the fit.")


def _without_replaced(run: Run, other: Run) -> dict[str, Any]:
    """Return the traces of a run. Where another run ended with an optimizer of another class, only its hooks count."""
    found, others = (each.traces["trainer"]["optimizers"] for each in (run, other))
    optimizers = [
        {name: value for name, value in one.items() if one["class"] == two["class"] or name.endswith("_hooks")}
        for one, two in zip(found, others, strict=False)
    ]
    return {**run.traces, "trainer": {**run.traces["trainer"], "optimizers": optimizers + found[len(optimizers) :]}}


def _with_owner(module: nn.Module, words: str) -> tuple[str, str]:
    """Add the first hook or method on the module that no library defines, and return its place too."""
    for where, function in hooks_and_methods(module):
        line = line_of_function(function)
        if line:
            return f"{words}; {where} holds {getattr(function, '__qualname__', function)}", line
    return words, ""


def _pickles(part: Any) -> bool:
    try:
        pickle.loads(pickle.dumps(part))
    except Exception:
        return False
    return True


@check("quick")
def g3_second_fit_equals_the_first(subject: Subject) -> None:
    """After a fit and a validation, another fit of the same callback ends with bitwise the weights and state of its first."""
    first = subject.bare()
    path = None
    with contextlib.suppress(Exception):  # a check of its own says so if saving fails
        path = max(subject.watched().saved("epochs").values())
    if first.trainer.num_val_batches:
        subject.validate(subject.project.make(), first.callbacks, path)
    _assert_equal(subject, first, subject.run(first.callbacks), "second fit")


@check("full")
def g3_fit_after_an_exception_equals_the_first(subject: Subject) -> None:
    """After a fit that an exception ended, another fit of the same callback ends like one of a new callback."""
    again = subject.run(subject.broken("exception").callbacks)
    _assert_equal(subject, subject.bare(), again, "fit after an exception")


def _assert_equal(subject: Subject, first: Run, again: Run, which: str) -> None:
    """Raise unless two fits ended with the same weights, and with the same state of the callback."""
    assert_identical(first.weights, again.weights, f"weights of the {which}")
    try:
        assert_identical(first.left["callbacks"], again.left["callbacks"], f"state after the {which}: callbacks")
    except AssertionError as error:
        if not state_varies(subject):
            raise GuaranteeError(str(error), line_of_class(subject.kind, "state_dict")) from error


@check("quick")
def g3_pickles_and_copies(subject: Subject) -> None:
    """The callback pickles and copies before and after a fit."""
    for when, callback in (("before", subject.built()[0]), ("after", subject.bare().callbacks[0])):
        with without_links(callback):
            for how, duplicate in (("pickle", _pickled), ("deepcopy", copy.deepcopy)):
                _assert_copies(callback, how, duplicate, when)


def _assert_copies(callback: Any, how: str, duplicate: Callable[[Any], Any], when: str) -> None:
    try:
        twin = duplicate(callback)
    except Exception as error:
        raise GuaranteeError(f"{how} {when} the fit: {type(error).__name__}: {error}{_culprit(callback)}") from error
    if twin.state_key != callback.state_key:
        raise GuaranteeError(
            f"{how} {when} the fit changes state_key from {callback.state_key!r} to {twin.state_key!r}."
        )


def _pickled(callback: Any) -> Any:
    return pickle.loads(pickle.dumps(callback))


def _culprit(callback: Any) -> str:
    """Return the names of the attributes that do not pickle, as words for the end of a message."""
    names = []
    for name, value in vars(callback).items():
        try:
            pickle.dumps(value)
        except Exception:
            names.append(name)
    return f" (of its attribute {', '.join(names)})" if names else ""


@check("full")
def g3_copy_in_a_fit_holds_no_run(subject: Subject) -> None:
    """A copy of the callback, taken during a fit, contains no module, optimizer or trainer."""
    errors = subject.watched().watch.pickling_errors
    if not errors:
        return
    (callback,) = subject.built()
    if _culprit(callback):
        raise NotApplicableError("It does not pickle before the fit either; see g3_pickles_and_copies.")
    raise GuaranteeError(f"pickle in the fit: {errors[0]}") from errors[0]


@check("full")
def g3_module_copied_in_a_fit_is_plain(subject: Subject) -> None:
    """A copy of a child of the module, taken in validation, has its plain class and computes the same."""
    if reason := why_not_portable(subject):
        raise NotApplicableError(reason)
    plain, watch = subject.plain.watched().watch, subject.watched().watch
    if not (plain.copies and watch.copies) or plain.copying_errors:
        raise NotApplicableError("The children of the module do not pickle, or return no tensor.")
    if watch.copying_errors:
        raise watch.copying_errors[0]
    known = [_classes(twin) for twin, *_ in plain.copies]  # the callback may change how often validation runs
    for twin, inputs, output in watch.copies:
        if _classes(twin) not in known:
            raise GuaranteeError(f"A copied {type(twin).__name__} consists of {', '.join(_classes(twin))}")
        with torch.no_grad():
            assert_identical(output, twin.eval()(*inputs), f"output of a copied {type(twin).__name__}")


def _classes(module: nn.Module) -> list[str]:
    return [f"{type(child).__module__}.{type(child).__qualname__}" for child in module.modules()]
