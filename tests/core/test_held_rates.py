"""Rates that are held: several holders, rates that others set meanwhile, groups, tensors."""

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch

from lightning_grad.core import HeldRates


def sgd(*rates: Any) -> torch.optim.SGD:
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates])


def rates(optimizer: Any) -> list[Any]:
    return [group["lr"] for group in optimizer.param_groups]


def test_rates_are_multiplied_and_given_back_as_the_objects_they_were() -> None:
    first, second = 0.1, 0.03
    optimizer = sgd(first, second)
    held = HeldRates(optimizer)
    held.multiply(0.7)
    assert rates(optimizer) == [first * 0.7, second * 0.7]
    held.multiply(0.5)
    assert rates(optimizer) == [first * 0.5, second * 0.5], "another factor takes the place of the first"
    held.give_back()
    assert rates(optimizer)[0] is first
    assert rates(optimizer)[1] is second
    held.give_back()
    assert rates(optimizer) == [first, second]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_three_hold_and_give_back_in_any_order(order: Any) -> None:
    """Each that keeps the rate it found would put back what another has multiplied."""
    optimizer, factors = sgd(0.1), [0.5, 0.3, 7.0]
    holders = [HeldRates(optimizer) for _ in factors]
    for holder, factor in zip(holders, factors, strict=True):
        holder.multiply(factor)
    left = dict(enumerate(factors))
    for index in order:
        holders[index].give_back()
        del left[index]
        expected = 0.1
        for factor in left.values():
            expected *= factor
        assert rates(optimizer) == [expected]
    assert rates(optimizer) == [0.1]
    assert not [name for name in vars(optimizer) if "lightning_grad" in name]


def test_each_group_has_a_factor_of_its_own() -> None:
    optimizer = sgd(0.1, 0.2)
    HeldRates(optimizer).multiply([0.5, 1.0])
    assert rates(optimizer) == [0.05, 0.2]


def test_a_rate_set_meanwhile_is_multiplied_once_followed_and_stays() -> None:
    optimizer = sgd(0.1, 0.2)
    one, other = HeldRates(optimizer), HeldRates(optimizer)
    one.multiply(0.5)
    other.multiply(0.1)
    optimizer.param_groups[0]["lr"] = 0.8
    one.follow()
    assert rates(optimizer) == [0.8 * 0.5 * 0.1, 0.2 * 0.5 * 0.1]
    one.give_back()
    other.give_back()
    assert rates(optimizer) == [0.8, 0.2]


def test_a_rate_set_meanwhile_and_not_followed_stays_too() -> None:
    optimizer = sgd(0.1, 0.2)
    held = HeldRates(optimizer)
    held.multiply(0.5)
    optimizer.param_groups[1]["lr"] = 0.8
    held.give_back()
    assert rates(optimizer) == [0.1, 0.8]


def test_a_factor_of_one_holds_nothing() -> None:
    optimizer = sgd(0.1)
    held = HeldRates(optimizer)
    held.multiply(1.0)
    assert not [name for name in vars(optimizer) if "lightning_grad" in name]
    held.multiply(0.5)
    held.multiply(1.0)
    assert rates(optimizer) == [0.1]


def test_rates_and_factors_may_be_tensors() -> None:
    rate = torch.tensor(0.5)
    optimizer = sgd(rate)
    held = HeldRates(optimizer)
    held.multiply(torch.tensor(0.25))
    assert torch.equal(rates(optimizer)[0], torch.tensor(0.125))
    held.give_back()
    assert rates(optimizer)[0] is rate
    assert rate == 0.5


def test_a_group_that_is_added_meanwhile_keeps_its_rate() -> None:
    optimizer = sgd(0.1)
    held = HeldRates(optimizer)
    held.multiply(0.5)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 0.7})
    held.follow()
    assert rates(optimizer) == [0.05, 0.7]
    held.give_back()
    assert rates(optimizer) == [0.1, 0.7]


def test_an_optimizer_is_copied_while_its_rates_are_held() -> None:
    optimizer = sgd(0.1)
    HeldRates(optimizer).multiply(0.5)
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert rates(copied) == [0.05]
        assert not [name for name in vars(copied) if "lightning_grad" in name]
