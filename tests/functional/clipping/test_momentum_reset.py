"""Momentum reset: moments in place, and the warm-up of SPAM."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_grad.functional import reset_moments_, reset_warmup
from tests.functional.clipping.shards import shard
from tests.functional.ranks import on_two_ranks


def test_moments_are_zeroed_in_place_and_steps_stay() -> None:
    first = {"step": torch.tensor(3.0), "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}
    second = {"exp_avg": torch.ones(3, dtype=torch.bfloat16), "exp_avg_sq": torch.ones(3), "other": torch.ones(1)}
    kept = dict(first)
    reset_moments_([first, {}, second])
    assert first["exp_avg"] is kept["exp_avg"]
    assert first["exp_avg"].tolist() == first["exp_avg_sq"].tolist() == [0.0, 0.0]
    assert second["exp_avg"].tolist() == second["exp_avg_sq"].tolist() == [0.0, 0.0, 0.0]
    assert first["step"].item() == 3.0
    assert second["other"].item() == 1.0


def test_the_largest_moments_of_amsgrad_are_zeroed_too() -> None:
    """Or the divisor would remember the spike for ever."""
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.Adam([parameter], amsgrad=True)
    parameter.grad = torch.full((3,), 1e6)
    optimizer.step()
    reset_moments_(list(optimizer.state.values()))
    state = optimizer.state[parameter]
    assert {key: value.abs().max().item() for key, value in state.items()} == {
        "step": 1.0,
        "exp_avg": 0.0,
        "exp_avg_sq": 0.0,
        "max_exp_avg_sq": 0.0,
    }


@pytest.mark.parametrize("states", [[], [{}], [{"momentum_buffer": torch.ones(1)}]])
def test_states_without_moments_are_passed_over(states: list[dict[str, Tensor]]) -> None:
    reset_moments_(states)
    assert all(torch.equal(value, torch.ones(1)) for state in states for value in state.values())


@pytest.mark.parametrize("warmup", [1, 2, 10, 150])
def test_warmup_is_the_cosine_decay_of_spam(warmup: int) -> None:
    """SPAM keeps a death rate of 0.99 in an optimizer of its own, and lets torch's schedule lower it over T + 1 steps."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.99)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, warmup + 1)
    for step in range(warmup + 5):
        death_rate = optimizer.param_groups[0]["lr"] if step < warmup else 0.0
        assert reset_warmup(step, warmup) == pytest.approx(1.0 - death_rate, rel=1e-9)
        optimizer.step()
        if step < warmup:
            schedule.step()
    assert reset_warmup(0, warmup) == pytest.approx(0.01)


def test_no_warmup_lowers_nothing() -> None:
    assert [reset_warmup(step, 0) for step in range(3)] == [1.0, 1.0, 1.0]


def moments_sharded_and_plain_are_reset(rank: int, mesh: Any) -> None:
    states = [{"exp_avg": shard(torch.ones(4, 2), mesh)}, {"exp_avg": torch.ones(3)}]
    reset_moments_(states)
    assert states[0]["exp_avg"].full_tensor().tolist() == [[0.0, 0.0]] * 4
    assert states[1]["exp_avg"].tolist() == [0.0] * 3


def test_dtensors() -> None:
    on_two_ranks(moments_sharded_and_plain_are_reset)
