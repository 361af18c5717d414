"""Residuals and their momentum against torch's SGD, and what is sent against what was taken out."""

import math

import pytest
import torch
from torch import Tensor

from lightning_grad.functional import accumulate_residual_, remove_sent_
from lightning_grad.functional.communication.error_feedback import as_sent

NAN, INF = float("nan"), float("inf")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_residual_that_is_always_sent_is_the_update_of_sgd(nesterov: bool) -> None:
    """Also while the momentum is scheduled, as OneCycleLR does."""
    weight = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    sgd = torch.optim.SGD([weight], lr=1.0, momentum=0.9, nesterov=nesterov)
    velocity, sent = torch.zeros(5).double(), torch.zeros(5).double()
    for step in range(6):
        gradient, momentum = draw(5, seed=step), 0.95 - 0.1 * step
        sgd.param_groups[0]["momentum"] = momentum
        weight.grad = gradient.clone()
        sgd.step()
        sent += accumulate_residual_(torch.zeros(5).double(), gradient, velocity, momentum, nesterov)
        torch.testing.assert_close(sent, -weight.detach(), rtol=1e-12, atol=1e-12)


def test_the_papers_nesterov_is_ours_while_the_momentum_stays() -> None:
    velocity, papers = torch.zeros(5).double(), torch.zeros(5).double()
    residual, expected = torch.zeros(5).double(), torch.zeros(5).double()
    for step in range(6):
        gradient = draw(5, seed=step)
        accumulate_residual_(residual, gradient, velocity, 0.9, nesterov=True)
        papers = 0.9 * (papers + gradient)
        expected += papers + gradient
        torch.testing.assert_close(residual, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(0.9 * velocity, papers, rtol=1e-12, atol=1e-12)


def test_without_velocity_it_is_a_sum_in_place() -> None:
    residual = torch.zeros(5)
    for step in range(4):
        assert accumulate_residual_(residual, draw(5, seed=step, dtype=torch.float32)) is residual
    torch.testing.assert_close(residual, sum(draw(5, seed=step) for step in range(4)).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_half_types_are_added_in_the_type_of_the_residual(dtype: torch.dtype) -> None:
    residual, velocity = torch.full((3,), 256.0), torch.zeros(3)
    accumulate_residual_(residual, torch.full((3,), 2.0**-10, dtype=dtype), velocity, 0.5)
    assert residual.tolist() == [256.0 + 2.0**-10] * 3
    assert velocity.tolist() == [2.0**-10] * 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_what_is_sent_fits_its_type(dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    values = torch.tensor([1e300, -1e300, 0.1, NAN], dtype=torch.float64)
    sent = as_sent(values, dtype)
    assert sent.dtype == dtype
    assert sent[:2].tolist() == [most, -most]
    assert sent[2] == torch.tensor(0.1).double().to(dtype)
    assert sent[3].isnan()


def test_what_needs_no_clamp_is_left_alone() -> None:
    values = torch.tensor([1.5, -INF, INF])
    assert as_sent(values, torch.float32).tolist() == [1.5, -INF, INF]
    assert as_sent(values, torch.float64).tolist() == [1.5, -INF, INF]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_sent_and_residual_are_what_was_there(dtype: torch.dtype) -> None:
    residual = draw(100, dtype=torch.float32)
    residual[7] = 1e6  # beyond float16
    before, indices = residual.clone(), torch.tensor([3, 7, 50])
    sent = as_sent(residual[indices], dtype)
    assert remove_sent_(residual, indices, sent) is residual
    residual[indices] += sent.float()
    assert torch.equal(residual, before)


def test_what_rounding_takes_away_is_sent_later() -> None:
    residual, total = torch.tensor([1 / 3]), 0.0
    for _ in range(3):
        sent = as_sent(residual, torch.bfloat16)
        remove_sent_(residual, torch.tensor([0]), sent)
        total += float(sent)
    assert math.isclose(total, float(torch.tensor(1 / 3)), rel_tol=1e-7)


def test_momentum_stops_where_something_was_sent_and_nowhere_else() -> None:
    residual, velocity = draw(10), draw(10, seed=1)
    before = velocity.clone()
    indices = torch.tensor([2, 9])
    remove_sent_(residual, indices, residual[indices], velocity)
    assert velocity[indices].tolist() == [0.0, 0.0]
    rest = [i for i in range(10) if i not in (2, 9)]
    assert torch.equal(velocity[rest], before[rest])
    assert residual[indices].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("masking", [False, True])
@pytest.mark.parametrize("value", [1.0, NAN])
def test_what_did_not_arrive_stays(value: float, masking: bool) -> None:
    residual, velocity = draw(10), draw(10, seed=1)
    before = residual.clone(), velocity.clone()
    sent = torch.full((2,), value, dtype=torch.float64)
    velocities = velocity if masking else None
    remove_sent_(residual, torch.tensor([2, 9]), sent, velocities, torch.tensor(False))
    assert torch.equal(residual, before[0])
    assert torch.equal(velocity, before[1])
    remove_sent_(residual, torch.tensor([2, 9]), residual[[2, 9]], velocities, torch.tensor(True))
    assert residual[[2, 9]].tolist() == [0.0, 0.0]
    assert (velocity[[2, 9]] == 0).all() == masking
