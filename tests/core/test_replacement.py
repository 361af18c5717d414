"""replace_optimizer: everything that holds the old optimizer sees the new one, until it is given back."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CyclicLR, SequentialLR, StepLR

from lightning_grad.core import replace_optimizer
from lightning_grad.core.steps.replacement import held_schedulers


class Outer:
    """A scheduler of no library, which holds optimizers and schedulers in its own ways."""

    def __init__(self, optimizer: Optimizer, inner: Any) -> None:
        self.pair, self.listed, self.by_name = (optimizer, 1), [optimizer], {"inner": [inner]}
        self.again = self

    def state_dict(self) -> dict[str, Any]:
        return {}

    def step(self) -> None:
        self.by_name["inner"][0].step()


def _new(old: Optimizer) -> SGD:
    keys = ("params", "lr", "initial_lr", "name")
    return SGD([{key: group[key] for key in keys if key in group} for group in old.param_groups], momentum=0.5)


@pytest.fixture
def old() -> AdamW:
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    return AdamW([{"params": [weight], "name": "weight"}], lr=1.0)


def test_holders_of_every_kind_get_the_new_one(old: AdamW) -> None:
    inner = SequentialLR(old, [StepLR(old, 1), StepLR(old, 1)], [3])
    outer = Outer(old, inner)
    new = _new(old)
    replace_optimizer(old, new, [outer])
    assert outer.pair == (new, 1)
    assert outer.listed == [new]
    schedulers = list(held_schedulers([outer]))
    assert len(schedulers) == 4, "each once, although one holds itself"
    assert all(each.optimizer is new for each in schedulers[1:])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's, that the optimizer made no step
        old.step()
        outer.step()
    assert new.param_groups[0]["lr"] == pytest.approx(0.1)
    assert "momentum_buffer" in old.state[new.param_groups[0]["params"][0]]


def test_hooks_run_on_the_new_one_and_can_be_removed(old: AdamW) -> None:
    called: list[Any] = []
    before = old.register_step_pre_hook(lambda o, *_: called.append(o))
    old.register_state_dict_post_hook(lambda o, state: {**state, "mark": 1})
    new = _new(old)
    of_new = new.register_step_post_hook(lambda *_: called.append("after"))
    replace_optimizer(old, new, [])
    new.step()
    assert called == [new, "after"]
    assert new.state_dict()["mark"] == 1
    before.remove()
    old.step()
    assert called == [new, "after", "after"]
    del of_new


def test_the_old_object_is_given_back(old: AdamW) -> None:
    group, groups, scheduler = old.param_groups[0], old.param_groups, StepLR(old, 1)
    scheduler.cycle_momentum = True  # type: ignore[attr-defined]  # as in a class of its own, without torch's use_beta1
    new = _new(old)
    give_back = replace_optimizer(old, new, [scheduler])
    assert scheduler.optimizer is new
    assert groups is new.param_groups
    assert group is new.param_groups[0]
    assert "betas" not in group
    old.step()
    give_back()
    assert old.param_groups[0]["betas"] == (0.9, 0.999)
    assert scheduler.optimizer is old
    assert not old.state
    assert new.state
    old.step()
    assert "exp_avg" in next(iter(old.state.values()))


def test_a_cycled_momentum_moves_from_beta1(old: AdamW) -> None:
    scheduler = CyclicLR(old, 0.1, 1.0, step_size_up=2, base_momentum=0.6, max_momentum=0.8)
    new = _new(old)
    replace_optimizer(old, new, [scheduler])
    assert new.param_groups[0]["momentum"] == 0.8
    new.step()
    scheduler.step()
    assert new.param_groups[0]["momentum"] == pytest.approx(0.7)
    assert "betas" not in new.param_groups[0]
