"""Rates of single parameters: what the optimizer sees while it updates, and what all others see."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_grad.core.steps.held_rates import HeldRates
from lightning_grad.core.steps.parameter_rates import ParameterRates


def parameters(count: int = 3) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(4, generator=generator)) for _ in range(count)]


def walk(weights: list[nn.Parameter], optimizer: Optimizer, steps: int = 4, closed: bool = False) -> list[Any]:
    for _ in range(steps):

        def closure() -> float:
            optimizer.zero_grad()
            sum((weight**4).sum() for weight in weights).backward()
            return 1.0

        if closed:
            assert optimizer.step(closure) == 1.0
        else:
            closure()
            assert optimizer.step() is None
    return [weight.tolist() for weight in weights]


def by_hand(make: Any) -> list[Any]:
    weights = parameters()
    rates = (0.05, 0.1, 0.025)
    return walk(weights, make([{"params": [w], "lr": lr} for w, lr in zip(weights, rates, strict=True)]))


def rated(make: Any) -> tuple[list[nn.Parameter], Optimizer, ParameterRates]:
    weights = parameters()
    optimizer = make(weights, lr=0.1)
    rates = ParameterRates(optimizer)
    rates.factors = {id(weights[0]): 0.5, id(weights[2]): 0.25}
    return weights, optimizer, rates


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("make", [SGD, Adam, AdamW, torch.optim.Adafactor, torch.optim.RMSprop])
def test_it_is_an_optimizer_with_groups_made_by_hand(make: Any, closed: bool) -> None:
    weights, optimizer, rates = rated(make)
    assert walk(weights, optimizer, closed=closed) == by_hand(make)
    rates.stop()
    rates.stop()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_hooks_and_closures_see_the_groups_of_the_user() -> None:
    _, optimizer, _ = rated(SGD)
    groups, seen = optimizer.param_groups, []

    def look(*_: Any) -> None:
        seen.append(optimizer.param_groups is groups and len(groups) == 1 and groups[0]["lr"] == 0.1)

    optimizer.register_step_pre_hook(look)
    after = optimizer.register_step_post_hook(look)
    optimizer._optimizer_step_post_hooks.move_to_end(after.id, last=False)  # as a hook that moves weights does
    optimizer.step(look)
    optimizer.step()
    assert seen == [True] * 5


def test_groups_are_restored_after_an_update_that_raised() -> None:
    class Raises(SGD):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            raise RuntimeError("the update")

    weights, optimizer, rates = rated(Raises)
    groups = optimizer.param_groups
    with pytest.raises(RuntimeError, match="the update"):
        walk(weights, optimizer, 1)
    rates.give_back()
    assert optimizer.param_groups is groups


def test_a_step_within_a_step_splits_once() -> None:
    class Outer(SGD):
        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            self.seen = len(self.param_groups)
            return loss

    SGD(parameters())  # both classes have hooks now
    weights, optimizer, _ = rated(Outer)
    assert walk(weights, optimizer) == by_hand(SGD)
    assert optimizer.seen == 3
    assert len(optimizer.param_groups) == 1


class Counts(SGD):
    """Keeps a count of steps in its groups, and whatever ``note`` returns."""

    def note(self, group: dict[str, Any]) -> Any:
        return group["weight_decay"]

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            group["noted"] = self.note(group)
        return loss


def test_what_an_optimizer_keeps_in_its_groups_goes_on() -> None:
    weights, optimizer, _ = rated(Counts)
    walk(weights, optimizer, 3)
    assert [group["count"] for group in optimizer.param_groups] == [3]
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_a_value_of_a_group_that_depends_on_the_rate_is_refused() -> None:
    class Sums(Counts):
        def note(self, group: dict[str, Any]) -> Any:
            return group["lr"]

    weights, optimizer, _ = rated(Sums)
    with pytest.raises(RuntimeError, match=r"does not work with Sums, which keeps 'noted' for a whole group"):
        walk(weights, optimizer, 1)
    assert len(optimizer.param_groups) == 1


def test_it_multiplies_with_rates_that_are_held_for_a_step() -> None:
    weights, optimizer, _ = rated(SGD)
    held = HeldRates(optimizer)
    optimizer.register_step_pre_hook(lambda *_: held.multiply(0.5))
    optimizer.register_step_post_hook(lambda *_: held.give_back())
    assert walk(weights, optimizer) == by_hand(lambda groups: SGD([{**g, "lr": g["lr"] * 0.5} for g in groups]))
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_rates_that_are_tensors_stay_tensors() -> None:
    weights, optimizer, _ = rated(lambda given, lr: AdamW(given, lr=torch.tensor(lr), foreach=False))
    walk(weights, optimizer)
    assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)
    assert optimizer.param_groups[0]["lr"] == torch.tensor(0.1)


def test_an_optimizer_without_closures_is_split_too() -> None:
    class Bare(SGD):
        def step(self) -> None:  # type: ignore[override]
            super().step()

    weights, optimizer, _ = rated(Bare)
    assert walk(weights, optimizer) == by_hand(SGD)
