"""Histories of samples, against all values at once and counts by hand."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_grad.functional import (
    aum,
    aum_state,
    forgetting,
    forgetting_state,
    update_aum_,
    update_forgetting_,
    update_vog_,
    vog,
    vog_state,
)

SEED = torch.Generator().manual_seed(0)
INF, NAN = math.inf, math.nan


def test_variance_of_gradients_against_all_checkpoints_at_once() -> None:
    n, shape, checkpoints = 7, (2, 3), 5
    gradients = torch.randn(checkpoints, n, *shape, generator=SEED, dtype=torch.float64) + 50.0
    state = vog_state(n, shape)
    for k in range(checkpoints):
        for batch in torch.randperm(n, generator=SEED).split(3):
            update_vog_(state, batch, gradients[k, batch])
    expected = gradients.std(dim=0, correction=0).flatten(1).mean(1)
    torch.testing.assert_close(vog(state), expected.float(), rtol=1e-5, atol=0.0)

    labels = torch.tensor([4, 1, 4, 4, 1, 4, 1])
    normalised = vog(state, labels)
    for label in (1, 4):
        own = expected[labels == label]
        found = normalised[labels == label]
        torch.testing.assert_close(found, ((own - own.mean()) / own.std(correction=0)).float(), rtol=1e-4, atol=1e-4)


def test_samples_never_seen_have_no_variance_and_do_not_count_in_their_class() -> None:
    state = vog_state(4, (1,))
    for gradient in (0.0, 1.0):
        update_vog_(state, torch.tensor([0, 2]), torch.tensor([[2.0], [6.0]]) * gradient)
    assert vog(state)[[0, 2]].tolist() == [1.0, 3.0]
    assert vog(state)[[1, 3]].isnan().all()
    normalised = vog(state, torch.tensor([0, 0, 0, 1]))
    assert normalised[[0, 2]].tolist() == [-1.0, 1.0]
    assert normalised[[1, 3]].isnan().all()


def test_forgetting_against_a_count_by_hand() -> None:
    n, rounds = 40, 12
    right = torch.rand(rounds, n, generator=SEED) < torch.linspace(0.0, 1.0, n)
    state = forgetting_state(n)
    for k in range(rounds):
        for batch in torch.randperm(n, generator=SEED).split(16):
            update_forgetting_(state, batch, right[k, batch])
    expected = []
    for history in right.T.tolist():
        events = sum(before and not after for before, after in itertools.pairwise(history))
        expected.append(float(events) if any(history) else INF)
    assert forgetting(state).tolist() == expected
    assert INF in expected
    assert 0.0 in expected


def test_forgetting_after_a_resume_goes_on() -> None:
    state = forgetting_state(1)
    update_forgetting_(state, torch.tensor([0]), torch.tensor([True]))
    resumed = {key: value.clone() for key, value in state.items()}
    update_forgetting_(resumed, torch.tensor([0]), torch.tensor([False]))
    assert forgetting(state).tolist() == [0.0]
    assert forgetting(resumed).tolist() == [1.0]


def test_forgetting_of_shares_and_of_nothing() -> None:
    state = forgetting_state(4)
    for shares in ([0.9, 0.4, NAN], [0.2, 0.5, NAN], [NAN, NAN, NAN], [0.8, 0.0, NAN], [0.5, 0.0, NAN]):
        update_forgetting_(state, torch.tensor([0, 1, 3]), torch.tensor(shares))
    assert forgetting(state)[:2].tolist() == [2.0, INF]
    assert forgetting(state)[2:].isnan().all()


def test_area_under_the_margin() -> None:
    margins = torch.randn(6, 9, generator=SEED)
    margins[2, 3] = NAN
    state = aum_state(10)
    for k in range(6):
        for batch in torch.randperm(9, generator=SEED).split(4):
            update_aum_(state, batch, margins[k, batch])
    torch.testing.assert_close(aum(state)[:9], margins.nanmean(0))
    assert aum(state)[9].isnan()


@pytest.mark.parametrize(
    ("state", "update"),
    [
        (vog_state(3, (2,)), lambda s: update_vog_(s, torch.tensor([1]), torch.ones(1, 2))),
        (forgetting_state(3), lambda s: update_forgetting_(s, torch.tensor([1]), torch.ones(1))),
        (aum_state(3), lambda s: update_aum_(s, torch.tensor([1]), torch.ones(1))),
    ],
    ids=["vog", "forgetting", "aum"],
)
def test_states_are_tensors_changed_in_place(state: dict[str, Tensor], update: Callable[[Any], None]) -> None:
    held = dict(state)
    before = {key: value.clone() for key, value in state.items()}
    update(state)
    assert all(state[key] is value for key, value in held.items())
    assert any(not torch.equal(state[key], value) for key, value in before.items())
    assert not any(value.requires_grad for value in state.values())


def test_updates_take_no_gradient() -> None:
    margins = torch.ones(1, requires_grad=True)
    state = aum_state(2)
    update_aum_(state, torch.tensor([0]), margins * 2)
    assert not aum(state).requires_grad
