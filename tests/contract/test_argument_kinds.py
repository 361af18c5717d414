"""G8: every argument of every constructor refuses what is not of its kind, and no infinity spoils a run.

The cases are made from the signatures, so a new argument is held to this the moment it exists.
"""

import collections.abc
import inspect
import math
import re
import types
import typing
from typing import Any, Literal, get_args, get_origin

import pytest
import torch

from lightning_grad.testing import fit, make_classifier
from tests.cases import cases
from tests.contract import settings, strategy_settings

_INF = math.inf
_ENTRIES = {entry.name: entry for entry in (*strategy_settings.CANONICAL, *settings.CANONICAL)}
_WRONG: dict[Any, list[Any]] = {
    bool: ["no", 0, 1.0],
    int: [1.5, True, "1", _INF, [1]],
    float: ["0.1", True, math.nan, [0.1]],
    str: [3, True, ["text"]],
    type(None): [],
}


def _members(kind: Any) -> list[Any]:
    return list(get_args(kind)) if get_origin(kind) in (typing.Union, types.UnionType) else [kind]


def _wrong_for(kind: Any) -> list[Any]:
    """Return values that are not of one kind."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return ["no such choice", 3, True]
    if origin is collections.abc.Sequence:
        return [3, True, "text", {"a": 1}, *([value] for value in _wrong_for(parts[0]))]
    if origin is collections.abc.Mapping:
        return [True, ["a"], *({"a": value} for value in _wrong_for(parts[1])), {3: None}]
    if origin is collections.abc.Callable:
        return [3, "package.function", True]
    if origin is tuple:
        return [[1], "ab"]
    return _WRONG.get(kind, [3, "text", True])


def _accepts(value: Any, kind: Any) -> bool:
    """Say whether a value is of one kind, in a way of its own and not by the code under test."""
    if kind in (int, float) and isinstance(value, (int, float)) and not isinstance(value, bool):
        return isinstance(value, int) or (kind is float and not math.isnan(value))
    if kind in (str, bool):
        return type(value) is kind
    if get_origin(kind) is collections.abc.Sequence and isinstance(value, list):
        return all(any(_accepts(item, part) for part in _members(get_args(kind)[0])) for item in value)
    return False


def _cases() -> list[Any]:
    found = []
    for name, entry in _ENTRIES.items():
        kinds = typing.get_type_hints(type(entry.build()).__init__)
        for argument in list(inspect.signature(type(entry.build()).__init__).parameters)[1:]:
            members = _members(kinds[argument])
            wrong = [value for member in members for value in _wrong_for(member)]
            wrong = [value for value in wrong if not any(_accepts(value, member) for member in members)]
            found.append(pytest.param(entry, argument, wrong, id=f"{name}-{argument}"))
    return found


@cases(("entry", "argument", "wrong"), _cases())
def test_what_is_not_of_its_kind_is_refused_in_words(entry, argument, wrong):
    assert wrong, "each argument has values that it cannot take"
    for value in wrong:
        with pytest.raises((TypeError, ValueError), match=rf"\b{argument}\b") as refusal:
            entry.build(**{argument: value})
        assert re.search(r" must be ", str(refusal.value)), (value, refusal.value)
        assert repr(value) in str(refusal.value), "the error shows what it got, text in quotes"


@pytest.mark.parametrize("entry", list(_ENTRIES.values()), ids=str)
def test_every_argument_says_what_it_takes(entry):
    kinds = typing.get_type_hints(type(entry.build()).__init__)
    arguments = list(inspect.signature(type(entry.build()).__init__).parameters)[1:]
    assert all(argument in kinds and kinds[argument] is not Any for argument in arguments)


def _infinities(entries: list[Any]) -> list[Any]:
    return [
        pytest.param(technique, argument, sign * _INF, id=f"{technique.name}-{argument}-{sign * _INF}")
        for technique in entries
        for argument, kind in typing.get_type_hints(type(technique.build()).__init__).items()
        if float in _members(kind)
        for sign in (1, -1)
    ]


@pytest.mark.parametrize(("scheme", "argument", "value"), _infinities(strategy_settings.CANONICAL))
def test_strategies_refuse_every_infinity(scheme, argument, value):
    with pytest.raises(ValueError, match=rf"\b{argument}\b.*inf"):
        scheme.build(**{argument: value})


@cases(("technique", "argument", "value"), _infinities(settings.CANONICAL))
def test_an_infinity_is_refused_or_does_no_harm(technique, argument, value):
    callback, refusal = _built_or_refused(technique, argument, value)
    if refusal:
        assert re.search(rf"\b{argument}\b", refusal)
        assert "inf" in refusal, "the error shows what it got"
        return
    trainer, module = fit([callback], make_classifier(), max_epochs=3)
    assert all(bool(value.isfinite().all()) for value in module.state_dict().values())
    rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
    assert all(math.isfinite(rate) for rate in rates)
    assert all(bool(torch.as_tensor(value).isfinite()) for value in trainer.callback_metrics.values())


def _built_or_refused(technique: Any, argument: str, value: Any) -> tuple[Any, str]:
    try:
        return technique.build(**{argument: value}), ""
    except ValueError as refusal:
        return None, str(refusal)
