"""Moments that are frozen stay, bias-corrected, through any number of steps; other moments go on."""

from typing import Any

import pytest
import torch

from lightning_grad.core import FrozenMoments


def stepped(optimizer_class: Any = torch.optim.Adam, steps: int = 5, **arguments: Any) -> tuple[Any, Any]:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = optimizer_class([weight], **arguments)
    for number in range(steps):
        step(optimizer, weight, number)
    return optimizer, weight


def step(optimizer: Any, weight: Any, seed: int) -> None:
    weight.grad = torch.randn(3, generator=torch.Generator().manual_seed(seed))
    optimizer.step()


def corrected(optimizer: Any, weight: Any, key: str = "exp_avg_sq", beta: int = 1) -> Any:
    state = optimizer.state[weight]
    return (state[key].double() / (1 - optimizer.defaults["betas"][beta] ** state["step"].double())).clone()


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("resumed", [False, True])
def test_second_moments_stay(amsgrad: bool, resumed: bool) -> None:
    optimizer, weight = stepped(amsgrad=amsgrad, eps=1e-3)
    before = corrected(optimizer, weight)
    frozen = FrozenMoments(optimizer, resumed)
    start = corrected(optimizer, weight)
    torch.testing.assert_close(start, before if resumed else before + 1e-3, rtol=1e-6, atol=0.0)
    first = corrected(optimizer, weight, "exp_avg", 0)
    for number in range(20):
        step(optimizer, weight, 50 + number)
        frozen.put_back()
        torch.testing.assert_close(corrected(optimizer, weight), start, rtol=1e-5, atol=0.0)
        if amsgrad:
            assert torch.equal(optimizer.state[weight]["max_exp_avg_sq"] > 0, torch.ones(3, dtype=torch.bool))
    assert not torch.allclose(corrected(optimizer, weight, "exp_avg", 0), first)


def test_other_moments_can_be_named() -> None:
    optimizer, weight = stepped()
    frozen = FrozenMoments(optimizer, resumed=True, moments={"exp_avg": 0})
    first, second = corrected(optimizer, weight, "exp_avg", 0), corrected(optimizer, weight)
    step(optimizer, weight, 99)
    frozen.put_back()
    torch.testing.assert_close(corrected(optimizer, weight, "exp_avg", 0), first, rtol=1e-5, atol=0.0)
    assert not torch.allclose(corrected(optimizer, weight), second, rtol=1e-3)


def test_without_moments_there_is_nothing_to_freeze() -> None:
    assert len(FrozenMoments(stepped(torch.optim.SGD, lr=0.1)[0])) == 0
    assert len(FrozenMoments(stepped()[0])) == 1
