"""An SGD whose momentum is applied outside is the same SGD, and nobody else sees that it is."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from lightning_grad.core import UndoList
from lightning_grad.functional import accumulate_residual_
from lightning_grad.strategies._local_momentum import LocalMomentum, why_not_moved


class Pair:
    """An SGD as it is, and one whose first parameters get their momentum from outside; both see the same gradients.

    Args:
        make: Builds the optimizer of four parameters.
        outside: How many of them are compressed.
    """

    def __init__(self, make: Callable[[list[nn.Parameter]], SGD], outside: int = 2) -> None:
        generator = torch.Generator().manual_seed(0)
        values = [torch.randn(3, 2, generator=generator, dtype=torch.float64) for _ in range(4)]
        self.plain, self.local = ([nn.Parameter(value.clone()) for value in values] for _ in range(2))
        self.expected, self.optimizer = make(self.plain), make(self.local)
        self.outside = self.local[:outside]
        self.momentum = LocalMomentum(self.optimizer, {id(parameter) for parameter in self.outside})
        self.undo = UndoList()
        self.momentum.attach(self.undo)
        self.velocity = [torch.zeros_like(parameter) for parameter in self.local]
        self.steps = 0

    def step(self, without: int | None = None) -> None:
        generator = torch.Generator().manual_seed(10 + self.steps)
        gradients = [torch.randn(3, 2, generator=generator, dtype=torch.float64) for _ in self.plain]

        def closure() -> Tensor:
            for place, (parameter, gradient) in enumerate(zip(self.local, gradients, strict=True)):
                parameter.grad = None if place == without else gradient.clone()
                if parameter.grad is not None and any(parameter is other for other in self.outside):
                    momentum, nesterov = self.momentum.of(parameter)
                    residual = torch.zeros_like(gradient)
                    parameter.grad = accumulate_residual_(residual, gradient, self.velocity[place], momentum, nesterov)
            return torch.tensor(7.0)

        for place, (parameter, gradient) in enumerate(zip(self.plain, gradients, strict=True)):
            parameter.grad = None if place == without else gradient.clone()
        self.expected.step()
        assert self.optimizer.step(closure) == 7.0
        self.steps += 1

    def check(self) -> None:
        for parameter, expected in zip(self.local, self.plain, strict=True):
            torch.testing.assert_close(parameter, expected, rtol=1e-12, atol=1e-12)
        found, wanted = self.optimizer.state_dict(), self.expected.state_dict()
        assert found["param_groups"] == wanted["param_groups"]


def groups_of_all_kinds(parameters: list[nn.Parameter], **options: Any) -> SGD:
    a, b, c, d = parameters
    groups = [
        {"params": [a, c], "momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
        {"params": [b], "momentum": 0.5, "weight_decay": 0.2, "lr": 0.05},
        {"params": [d], "momentum": 0.0, "weight_decay": 0.3},
    ]
    return SGD(groups, lr=0.1, **options)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], SGD]] = {
    "plain": lambda p: SGD(p, lr=0.1),
    "decay": lambda p: SGD(p, lr=0.1, weight_decay=0.1),
    "momentum": lambda p: SGD(p, lr=0.1, momentum=0.9),
    "momentum and decay": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "nesterov and decay": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "maximize": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, maximize=True),
    "groups": groups_of_all_kinds,
    "groups, foreach": lambda p: groups_of_all_kinds(p, foreach=True),
    "groups, fused": lambda p: groups_of_all_kinds(p, fused=True),
    "groups, a loop": lambda p: groups_of_all_kinds(p, foreach=False),
    "a rate that is a tensor": lambda p: SGD(
        p, lr=torch.tensor(0.1, dtype=torch.float64), momentum=0.9, weight_decay=0.1
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_the_same_sgd(name: str) -> None:
    pair = Pair(OPTIMIZERS[name])
    for _ in range(5):
        pair.step()
        pair.check()


@pytest.mark.parametrize("outside", [0, 1, 4])
def test_any_number_of_parameters_may_be_outside(outside: int) -> None:
    pair = Pair(groups_of_all_kinds, outside)
    for _ in range(4):
        pair.step()
    pair.check()


@pytest.mark.parametrize("name", ["momentum and decay", "nesterov and decay"])
def test_schedules_of_rate_momentum_and_decay_are_followed(name: str) -> None:
    pair = Pair(OPTIMIZERS[name])
    for step in range(8):
        for optimizer in (pair.expected, pair.optimizer):
            group = optimizer.param_groups[0]
            group.update(lr=0.1 / (1 + step), momentum=0.95 - 0.05 * step, weight_decay=0.1 * (step % 3))
        pair.step()
        pair.check()


def test_one_cycle_moves_the_users_groups() -> None:
    pair = Pair(OPTIMIZERS["nesterov and decay"])
    schedules = [torch.optim.lr_scheduler.OneCycleLR(o, 0.2, total_steps=20) for o in (pair.expected, pair.optimizer)]
    for _ in range(10):
        pair.step()
        for schedule in schedules:
            schedule.step()
        pair.check()
    assert pair.optimizer.param_groups[0]["momentum"] != 0.9


def test_a_parameter_without_gradient_is_passed_over() -> None:
    pair = Pair(OPTIMIZERS["momentum and decay"])
    for without in (0, 2, None, 0, None):
        pair.step(without)
        pair.check()


def test_a_group_that_is_added_later_is_seen() -> None:
    pair = Pair(lambda p: SGD(p[1:], lr=0.1, momentum=0.9, weight_decay=0.1))
    assert pair.momentum.of(pair.local[0]) == (0.0, False)
    pair.step()
    pair.velocity[0].zero_()  # nobody has moved it yet
    pair.expected.add_param_group({"params": [pair.plain[0]], "momentum": 0.5, "nesterov": True})
    pair.optimizer.add_param_group({"params": [pair.local[0]], "momentum": 0.5, "nesterov": True})
    for _ in range(4):
        pair.step()
        pair.check()
    assert pair.momentum.of(pair.local[0]) == (0.5, True)
    assert pair.momentum.of(pair.local[1]) == (0.9, False)


def test_a_loaded_state_is_seen() -> None:
    pair = Pair(OPTIMIZERS["momentum and decay"])
    pair.step()
    for optimizer in (pair.expected, pair.optimizer):
        state = optimizer.state_dict()
        state["param_groups"][0].update(momentum=0.3, lr=0.7)
        optimizer.load_state_dict(state)
    for _ in range(3):
        pair.step()
        pair.check()
    assert pair.momentum.of(pair.local[0]) == (0.3, False)


def test_momentum_from_before_decays_as_it_would_have() -> None:
    """A run that is resumed with compression has buffers of the whole gradient."""
    make = OPTIMIZERS["nesterov and decay"]
    pair = Pair(make)
    pair.undo.run()
    for parameter, twin in zip(pair.plain, pair.local, strict=True):
        parameter.grad, twin.grad = torch.ones_like(parameter), torch.ones_like(parameter)
    pair.expected.step()
    pair.optimizer.step()
    pair.momentum.attach(pair.undo)
    for _ in range(4):
        pair.step()
        pair.check()


def test_groups_are_the_users_for_everyone_but_the_update() -> None:
    """Also for hooks that were there before."""
    seen: list[Any] = []

    def look(optimizer: Any, *_: Any) -> None:
        seen.append((optimizer, [{**group, "params": len(group["params"])} for group in optimizer.param_groups]))

    def make(parameters: list[nn.Parameter]) -> SGD:
        optimizer = groups_of_all_kinds(parameters)
        optimizer.register_step_pre_hook(look)
        optimizer.register_step_post_hook(look)
        return optimizer

    pair = Pair(make)
    groups = pair.optimizer.param_groups
    users = [{**group, "params": len(group["params"])} for group in groups]
    pair.optimizer.register_step_pre_hook(look)
    pair.optimizer.register_step_post_hook(look)
    pair.step()
    pair.optimizer.step(Closure(lambda: look(pair.optimizer)))
    assert len([found for optimizer, found in seen if optimizer is pair.optimizer]) == 4 + 5
    assert all(found == users for _, found in seen)
    assert pair.optimizer.param_groups is groups


class Closure:
    def __init__(self, act: Callable[[], Any]) -> None:
        self.act = act

    def __call__(self) -> Tensor:
        self.act()
        return torch.tensor(0.0)


@pytest.mark.parametrize("how", ["nothing", "positional", "keyword"])
def test_the_step_is_called_as_before(how: str) -> None:
    pair = Pair(OPTIMIZERS["momentum"])
    for parameter in pair.local:
        parameter.grad = torch.ones_like(parameter)
    before = [parameter.detach().clone() for parameter in pair.local]
    closure = Closure(lambda: None)
    call = {"nothing": lambda: pair.optimizer.step(), "positional": lambda: pair.optimizer.step(closure)}
    found = call.get(how, lambda: pair.optimizer.step(closure=closure))()
    assert found is None if how == "nothing" else found == 0.0
    for parameter, old in zip(pair.local, before, strict=True):
        torch.testing.assert_close(parameter, old - 0.1)


def test_an_error_in_the_closure_leaves_everything() -> None:
    pair = Pair(groups_of_all_kinds)
    pair.step()
    groups, before = pair.optimizer.param_groups, [parameter.detach().clone() for parameter in pair.local]

    def fail() -> None:
        raise RuntimeError("in the batch")

    with pytest.raises(RuntimeError, match="in the batch"):
        pair.optimizer.step(Closure(fail))
    assert pair.optimizer.param_groups is groups
    assert all(torch.equal(parameter, old) for parameter, old in zip(pair.local, before, strict=True))
    pair.step()
    pair.check()


def test_an_error_in_the_update_is_undone_by_detaching() -> None:
    pair = Pair(groups_of_all_kinds)
    groups = pair.optimizer.param_groups
    pair.local[2].grad = torch.ones(3, 2, dtype=torch.float64)
    pair.local[0].grad = torch.ones(3, 2, dtype=torch.float64)
    pair.optimizer.state[pair.local[2]]["momentum_buffer"] = torch.ones(7)
    with pytest.raises(RuntimeError):
        pair.optimizer.step()
    pair.undo.run()
    assert pair.optimizer.param_groups is groups


def test_detached_it_is_a_plain_sgd_and_leaves_no_hook() -> None:
    pair = Pair(OPTIMIZERS["momentum and decay"])
    pair.step()
    pair.undo.run()
    pair.undo.run()
    assert not pair.optimizer._optimizer_step_pre_hooks
    assert not pair.optimizer._optimizer_step_post_hooks
    pickle.loads(pickle.dumps(pair.optimizer))
    for _ in range(2):
        pair.step()  # with a gradient that holds momentum already, which now is applied once more
    difference = (pair.local[0] - pair.plain[0]).abs().max()
    assert difference > 1e-3


def test_the_state_is_one_that_sgd_loads() -> None:
    pair = Pair(groups_of_all_kinds)
    for _ in range(2):
        pair.step()
    found, expected = pair.optimizer.state_dict(), pair.expected.state_dict()
    assert found.keys() == expected.keys()
    assert found["state"].keys() <= expected["state"].keys()
    for place, state in found["state"].items():
        assert state.keys() <= expected["state"][place].keys() == {"momentum_buffer"}
    groups_of_all_kinds([nn.Parameter(parameter.detach().clone()) for parameter in pair.local]).load_state_dict(found)


def test_without_decay_there_is_no_buffer() -> None:
    pair = Pair(OPTIMIZERS["momentum"])
    pair.step()
    assert {place for place, state in pair.optimizer.state_dict()["state"].items() if state} == {2, 3}


def test_only_the_step_of_sgd_is_known() -> None:
    class Renamed(SGD):
        pass

    class Other(SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            pass

    parameters = [nn.Parameter(torch.zeros(1))]
    assert not why_not_moved(SGD(parameters))
    assert not why_not_moved(Renamed(parameters))
    assert why_not_moved(Other(parameters))
    assert why_not_moved(torch.optim.AdamW(parameters))


def test_a_scheduler_that_wraps_the_step_does_not_hide_sgd() -> None:
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert not why_not_moved(optimizer)
