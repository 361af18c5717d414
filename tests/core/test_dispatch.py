"""A wrapped method is called through its wrappers in their order, and comes back exactly as it was."""

import copy
import functools
import inspect
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from lightning_grad.core.dispatch import MethodDispatcher, WrapOrder, acting, meter_wrappers, wrap_method


class Owner:
    """Something with a method."""

    def __init__(self, tag: str = "plain") -> None:
        self.tag = tag

    def step(self, batch: int, *, scale: int = 1) -> list[str]:
        """Take a step."""
        return [f"{self.tag}:{batch * scale}"]


class ModuleOwner(nn.Module):
    """A module with a method."""

    def training_step(self, batch: int) -> int:
        return batch + 1


def marking(name: str) -> Callable[..., list[str]]:
    def wrapper(inner: Callable[..., list[str]], *args: Any, **kwargs: Any) -> list[str]:
        return [f"{name}(", *inner(*args, **kwargs), ")"]

    return wrapper


def order(owner: Any) -> str:
    return "".join(name.strip("(") for name in owner.step(1) if name.endswith("("))


def test_wrapper_sees_and_may_change_arguments_and_result() -> None:
    owner = Owner()
    wrap_method(owner, "step", lambda inner, batch, scale=1: [*inner(batch + 1, scale=scale * 10), "after"])
    assert owner.step(1) == ["plain:20", "after"]
    assert owner.step(2, scale=3) == ["plain:90", "after"]


def test_wrapper_may_leave_the_call_out() -> None:
    owner = Owner()
    wrap_method(owner, "step", lambda inner, *args: ["skipped"])
    assert owner.step(1) == ["skipped"]


@pytest.mark.parametrize(
    "added", list(itertools.permutations([("a", WrapOrder.INPUTS), ("b", WrapOrder.WEIGHTS), ("c", WrapOrder.LOSSES)]))
)
def test_places_have_an_order_whatever_the_order_of_the_calls(added: tuple[tuple[str, WrapOrder], ...]) -> None:
    owner = Owner()
    for name, place in added:
        wrap_method(owner, "step", marking(name), place)
    assert order(owner) == "abc"


def test_of_one_place_the_last_is_outermost() -> None:
    owner = Owner()
    wrap_method(owner, "step", marking("a"))
    wrap_method(owner, "step", marking("b"))
    assert order(owner) == "ba"


@pytest.mark.parametrize("removed", list(itertools.permutations("abc")))
def test_nested_wrappers_may_go_in_any_order(removed: tuple[str, ...]) -> None:
    owner = Owner()
    undo = {
        name: wrap_method(owner, "step", marking(name), place) for place, name in zip(WrapOrder, "cba", strict=False)
    }
    left = "abc"
    for name in removed:
        undo[name]()
        left = left.replace(name, "")
        assert order(owner) == left
    assert owner.__dict__ == {"tag": "plain"}


@pytest.mark.parametrize("removed", list(itertools.permutations("abc")))
def test_attribute_that_stood_in_the_dict_comes_back_itself(removed: tuple[str, ...]) -> None:
    def own(batch: int) -> list[str]:
        return ["own"]

    owner = Owner()
    owner.step = own
    undo = {name: wrap_method(owner, "step", marking(name)) for name in "abc"}
    assert owner.step(1) == ["c(", "b(", "a(", "own", ")", ")", ")"]
    for name in removed:
        undo[name]()
    assert owner.__dict__["step"] is own


def test_undo_may_be_called_again_and_does_not_touch_a_later_wrapper() -> None:
    owner = Owner()
    first = wrap_method(owner, "step", marking("a"))
    first()
    first()
    second = wrap_method(owner, "step", marking("b"))
    first()
    assert order(owner) == "b"
    second()
    assert "step" not in owner.__dict__


def test_what_somebody_else_put_over_the_wrapper_stays() -> None:
    owner = Owner()
    undo = wrap_method(owner, "step", marking("a"))
    inner = owner.step
    owner.step = lambda batch: ["theirs", *inner(batch)]
    undo()
    assert owner.step(1) == ["theirs", "plain:1"]


def test_one_dispatcher_serves_each_method_of_each_object() -> None:
    one, other = Owner("one"), Owner("other")
    wrap_method(one, "step", marking("a"))
    wrap_method(one, "step", marking("b"))
    assert isinstance(one.__dict__["step"], MethodDispatcher)
    assert isinstance(one.__dict__["step"].__wrapped__.__self__, Owner)
    assert other.step(1) == ["other:1"]
    assert Owner("third").step(1) == ["third:1"]


def test_exception_of_the_method_passes_through() -> None:
    owner = Owner()
    wrap_method(owner, "step", marking("a"))
    with pytest.raises(TypeError, match="batch"):
        owner.step()


def test_wrapped_method_keeps_name_doc_and_signature() -> None:
    owner = Owner()
    plain = inspect.signature(owner.step)
    wrap_method(owner, "step", marking("a"))
    assert inspect.signature(owner.step) == plain
    assert owner.step.__name__ == "step"
    assert owner.step.__doc__ == "Take a step."
    assert owner.step.__wrapped__ == Owner.step.__get__(owner)


def through_pickle(owner: Any) -> Any:
    return pickle.loads(pickle.dumps(owner))


@pytest.mark.parametrize("duplicate", [through_pickle, copy.deepcopy])
def test_duplicate_of_the_owner_has_its_plain_method(duplicate: Callable[[Any], Any]) -> None:
    owner = Owner("mine")
    wrap_method(owner, "step", marking("a"))
    twin = duplicate(owner)
    twin.tag = "twin"
    assert twin.step(3) == ["twin:3"]
    assert owner.step(3) == ["a(", "mine:3", ")"]
    assert not isinstance(twin.__dict__.get("step"), MethodDispatcher)
    assert through_pickle(twin).step(3) == ["twin:3"]


@pytest.mark.parametrize("duplicate", [through_pickle, copy.deepcopy])
def test_duplicate_of_a_module_has_its_plain_method(duplicate: Callable[[Any], Any]) -> None:
    module = ModuleOwner()
    undo = wrap_method(module, "training_step", lambda inner, batch: -inner(batch))
    twin = duplicate(nn.ModuleList([module]))[0]
    assert (module.training_step(1), twin.training_step(1)) == (-2, 2)
    wrap_method(twin, "training_step", lambda inner, batch: 10 * inner(batch))()
    assert twin.training_step(1) == 2
    undo()
    assert module.training_step(1) == 2


def test_the_table_of_places_shows_each_from_the_outermost_to_the_innermost() -> None:
    rows = [line.split("``")[1] for line in (WrapOrder.__doc__ or "").splitlines() if line.strip().startswith("``")]
    assert rows == [place.name for place in sorted(WrapOrder, reverse=True)]


class Technique:
    """Something that wraps the method with a method of its own."""

    def around(self, extra: str, inner: Callable[..., list[str]], *args: Any) -> list[str]:
        return [extra, *inner(*args)]


def test_a_meter_gets_each_wrapper_with_its_owner():
    owner, technique, met = Owner(), Technique(), []

    def meter(by: object, wrapper: Callable[..., Any]) -> Callable[..., Any]:
        met.append(by)
        return lambda inner, *args: [f"<{len(met)}", *wrapper(inner, *args), ">"]

    wrap_method(owner, "step", functools.partial(technique.around, "own"))
    with acting("another"):
        wrap_method(owner, "step", functools.partial(technique.around, "another"))
    wrap_method(owner, "step", marking("unknown"))
    before = owner.step(1)
    stop = meter_wrappers(meter)
    measured = owner.step(1)
    stop()
    stop()
    assert met == [technique, "another", None]  # from the innermost
    assert [mark for mark in measured if mark not in before] == ["<3", "<3", "<3", ">", ">", ">"]
    assert [mark for mark in measured if mark in before] == before
    assert owner.step(1) == before


def test_an_inner_block_names_its_own_owner():
    owner, met = Owner(), []
    with acting("outer"):
        with acting("inner"):
            wrap_method(owner, "step", marking("first"))
        wrap_method(owner, "step", marking("second"))
    stop = meter_wrappers(lambda by, wrapper: met.append(by) or wrapper)
    owner.step(1)
    stop()
    assert met == ["inner", "outer"]
