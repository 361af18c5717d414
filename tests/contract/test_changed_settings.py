"""G5, G8: a run that resumes under other settings follows them and says so, or refuses in words."""

import typing
from typing import Any, Literal, get_args, get_origin

import pytest
import torch

from lightning_grad.testing import fit
from tests.contract.recorded import watched
from tests.contract.settings import CANONICAL

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


def _other(value: Any, kind: Any) -> Any:
    """Return another value of the same kind, or the same where none is simple."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float) and value not in (0.0, float("inf")):
        return value * 0.5
    if get_origin(kind) is Literal:
        return next(choice for choice in get_args(kind) if choice != value)
    return value


def _changes(technique: Any) -> dict[str, Any]:
    """Return the settings that can be changed one by one, with another value for each."""
    callback = technique.build()
    kinds = typing.get_type_hints(type(callback).__init__)
    found = {}
    for name, value in callback.settings.items():
        other = _other(value, kinds[name])
        try:
            technique.build(**{name: other})
        except ValueError:  # does not go with the others
            continue
        if other != value:
            found[name] = other
    return found


def _checkpoint_of(technique: Any) -> Any:
    """Return where the technique's run was saved after half of its epochs."""
    return list(watched(technique).saved("epochs").values())[1]


@pytest.mark.parametrize("technique", CANONICAL, ids=str)
def test_each_changed_setting_is_followed_and_said_or_refused(technique, caplog):
    changes = _changes(technique)
    assert changes or not technique.build().settings.keys() - {"name", "include", "exclude"}
    for name, value in changes.items():
        caplog.clear()
        caplog.set_level("INFO")
        refusal = _refusal([technique.build(**{name: value})], _checkpoint_of(technique))
        assert name in refusal if refusal else f"changed settings: {name}={value!r} (was " in caplog.text


def _refusal(callbacks: list[Any], checkpoint: Any) -> str:
    """Resume, and return the words of the refusal, empty if the run came to its end."""
    try:
        fit(callbacks, ckpt=checkpoint, max_epochs=3)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("technique", CANONICAL, ids=str)
def test_the_settings_are_in_the_checkpoint(technique):
    saved = torch.load(_checkpoint_of(technique), weights_only=True)["callbacks"]
    (state,) = (state for key, state in saved.items() if key == technique.build().state_key)
    assert state["settings"].keys() == technique.build().settings.keys()
