"""What cannot work is refused in words that say what to do."""

from typing import Any

import pytest
import torch
from torch import nn

from lightning_grad.utilities.checks import (
    check_above,
    check_at_least,
    check_between,
    check_choice,
    check_count,
    check_count_between,
    check_finite,
    check_finite_above,
    check_finite_at_least,
    check_name,
    check_only_one,
    check_share,
    owned_ids,
)
from lightning_grad.utilities.reporting import is_installed

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("check", "value", "bounds", "wrong"),
    [
        (check_at_least, 0.5, (0.5,), 0.4),
        (check_count, 2, (2,), 1),
        (check_above, 0.5, (0.4,), 0.4),
        (check_finite, 0.5, (), float("inf")),
        (check_finite_at_least, 0.5, (0.5,), float("inf")),
        (check_finite_above, 0.5, (0.4,), float("inf")),
        (check_count_between, 3, (2, 3), 4),
        (check_between, 0.5, (0.0, 1.0), 1.1),
        (check_share, 0.0, (), 1.0),
    ],
)
def test_a_check_returns_the_value_that_it_lets_pass(check: Any, value: Any, bounds: Any, wrong: Any) -> None:
    assert check(value, *bounds, "argument") is value
    with pytest.raises(ValueError, match="argument must be"):
        check(wrong, *bounds, "argument")


def test_a_position_may_be_left_out() -> None:
    assert check_count(None, 0, "loss") is None


def test_what_is_given_by_two_arguments_is_refused() -> None:
    check_only_one({"loss_index": 0, "loss_fn": None, "scores_by='sample'": False, "score_files": []}, "say it")
    with pytest.raises(ValueError, match=r"^loss_index and score_files would both say it\. Set only one of them\.$"):
        check_only_one({"loss_index": 0, "loss_fn": None, "score_files": ["a.npz"]}, "say it")


def test_choice_that_is_known_passes() -> None:
    check_choice("ste", ["ste", "sr-ste"], "recipe")


def test_unknown_choice_names_all_and_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"recipe must be 'ste' or 'sr-ste'; got 'sr-st'\. Did you mean 'sr-ste'\?"):
        check_choice("sr-st", iter(["ste", "sr-ste"]), "recipe")


@pytest.mark.parametrize("value", ["quite different", None, 3])
def test_choice_far_from_all_gets_no_suggestion(value: object) -> None:
    with pytest.raises(ValueError, match=r"gradient must be 'masked' or 'ste'; got .*\.$"):
        check_choice(value, ["masked", "ste"], "gradient")


@pytest.mark.parametrize(("value", "least"), [(1, 1), (2.5, 1), (float("inf"), 0)])
def test_number_that_is_large_enough_passes(value: float, least: float) -> None:
    check_at_least(value, least, "top")


@pytest.mark.parametrize("value", [0, -1, 0.999, float("nan")])
def test_number_that_is_too_small_or_none_raises(value: float) -> None:
    with pytest.raises(ValueError, match=f"mask_every_n_steps must be at least 1; got {value}"):
        check_at_least(value, 1, "mask_every_n_steps")


def test_owned_parameters_come_from_every_group() -> None:
    one, two, other = (nn.Parameter(torch.zeros(1)) for _ in range(3))
    optimizer = torch.optim.SGD([{"params": [one]}, {"params": [two], "lr": 0.5}], lr=0.1)
    assert owned_ids(optimizer) == {id(one), id(two)}
    assert id(other) not in owned_ids(optimizer)


def test_packages_are_asked_for_without_importing_them() -> None:
    assert is_installed("torch")
    assert not is_installed("no_such_package_at_all")


@pytest.mark.parametrize(
    "name", [None, "late", "of the second loader", "späte Runde", "v1.2", "a-b_c", "a[0]", "x" * 100]
)
def test_names_that_files_and_log_keys_can_carry_pass(name: str | None) -> None:
    check_name(name)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("../../x", "contain slashes"),
        ("/etc/x", "contain slashes"),
        ("late/half", "contain slashes"),
        ("..\\x", "contain slashes"),
        ("a\0b", "printable"),
        ("a\nb", "printable"),
        ("a\x1b[31m", "printable"),
        ("\ud800", "printable"),
        ("", "be empty"),
        ("  ", "be empty"),
        ("x" * 101, "at most 100 bytes"),
        ("ä" * 51, "at most 100 bytes"),
        ("x" * 100_000, "at most 100 bytes"),
    ],
)
def test_names_that_leave_the_folder_or_that_no_file_can_carry_raise(name: str, fault: str) -> None:
    with pytest.raises(ValueError, match=fault) as caught:
        check_name(name)
    assert str(caught.value).startswith("name must")
    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(("value", "bound"), [(1e-300, 0.0), (INF, 0.0), (2, 1)])
def test_number_above_a_bound_passes(value: float, bound: float) -> None:
    check_above(value, bound, "max_norm")


@pytest.mark.parametrize("value", [0.0, -1.0, NAN, -INF])
def test_number_at_a_bound_or_below_it_raises(value: float) -> None:
    with pytest.raises(ValueError, match=f"max_norm must be above 0; got {value}"):
        check_above(value, 0.0, "max_norm")


@pytest.mark.parametrize("value", [0, 0.0, 50, 100.0])
def test_number_in_a_range_passes(value: float) -> None:
    check_between(value, 0.0, 100.0, "percentile")


@pytest.mark.parametrize("value", [-1e-9, 100.001, NAN, INF])
def test_number_outside_a_range_raises(value: float) -> None:
    with pytest.raises(ValueError, match=f"percentile must be from 0 to 100; got {value}"):
        check_between(value, 0.0, 100.0, "percentile")
