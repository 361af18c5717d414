"""Scaling rates: what is multiplied, once, and what is left; which groups are chosen."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.optim import lr_scheduler as lrs

from lightning_grad.core.steps.chosen_rates import (
    ChosenRates,
    base_rate,
    restore_initial_rates_,
    scale_rates_,
    scale_schedules_,
    unknown_schedulers,
)


def two_groups(lr=0.5, other=0.25):
    return SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (lr, other)])


def choose_groups(trainer_optimizers, optimizers, groups):
    return ChosenRates(optimizers, groups, needed_by="X").groups(SimpleNamespace(optimizers=trainer_optimizers))


def rates(optimizer, key="lr"):
    return [float(group[key]) for group in optimizer.param_groups]


def test_rates_of_the_chosen_groups_are_multiplied():
    optimizer = two_groups()
    scale_rates_([(optimizer, [1])], 0.5)
    assert rates(optimizer) == [0.5, 0.125]
    scale_rates_([(optimizer, [0, 1])], 0.5)
    assert rates(optimizer) == [0.25, 0.0625]


def test_a_rate_that_is_a_tensor_stays_the_same_tensor():
    optimizer = two_groups(torch.tensor(0.5), torch.tensor(0.25))
    before = [group["lr"] for group in optimizer.param_groups]
    scale_rates_([(optimizer, [0, 1])], 0.5)
    assert rates(optimizer) == [0.25, 0.125]
    assert all(group["lr"] is rate for group, rate in zip(optimizer.param_groups, before, strict=True))


def test_a_tensor_that_groups_share_is_multiplied_once():
    rate = torch.tensor(0.5)
    optimizer = Adam([{"params": [nn.Parameter(torch.zeros(1))]} for _ in range(3)], lr=rate)
    assert optimizer.param_groups[0]["lr"] is optimizer.param_groups[2]["lr"]
    scale_rates_([(optimizer, [0, 1, 2])], 0.5)
    assert rates(optimizer) == [0.25, 0.25, 0.25]
    scale_rates_([(optimizer, [0, 2])], 0.5)
    assert rates(optimizer) == [0.125, 0.25, 0.125], "the group that is not meant keeps its rate"


def test_base_rates_of_chosen_groups_and_of_schedulers_are_multiplied():
    optimizer = two_groups()
    cycle = lrs.OneCycleLR(optimizer, max_lr=[1.0, 2.0], total_steps=10)
    names = ("initial_lr", "max_lr", "min_lr")
    before = {name: rates(optimizer, name) for name in names}
    scale_schedules_([(optimizer, [1])], [cycle], 0.5)
    for name in names:
        assert rates(optimizer, name) == [before[name][0], before[name][1] * 0.5]
    assert rates(optimizer) == pytest.approx([0.04, 0.08]), "the present rate is not"
    assert cycle._last_lr == pytest.approx([0.04, 0.04])


def test_a_cyclic_schedule_has_lists_of_its_own():
    optimizer = two_groups()
    cyclic = lrs.CyclicLR(optimizer, base_lr=[0.1, 0.2], max_lr=[1.0, 2.0])
    scale_schedules_([(optimizer, [0])], [cyclic], 0.5)
    assert cyclic.base_lrs == [0.05, 0.2]
    assert cyclic.max_lrs == [0.5, 2.0]


def test_schedulers_within_schedulers_are_reached_once():
    optimizer = two_groups()
    inner = [lrs.LinearLR(optimizer, 0.5, total_iters=2), lrs.ExponentialLR(optimizer, 0.9)]
    outer = lrs.SequentialLR(optimizer, inner, milestones=[2])
    assert outer._last_lr is inner[0]._last_lr, "which would be scaled twice in place"
    shown = list(outer.get_last_lr())
    scale_schedules_([(optimizer, [0, 1])], [outer, inner[0]], 0.5)
    assert [scheduler.base_lrs for scheduler in inner] == [[0.25, 0.125]] * 2
    assert outer.get_last_lr() == inner[0].get_last_lr() == [rate * 0.5 for rate in shown]


def test_schedulers_of_other_optimizers_are_left_alone():
    one, other = two_groups(), two_groups()
    scheduler = lrs.ExponentialLR(other, 0.9)
    scale_schedules_([(one, [0, 1])], [scheduler], 0.5)
    assert scheduler.base_lrs == [0.5, 0.25]
    assert rates(other, "initial_lr") == [0.5, 0.25]


def test_initial_rates_that_are_tensors_are_no_alias_of_the_rate():
    optimizer = Adam([nn.Parameter(torch.zeros(1))], lr=torch.tensor(0.5))
    scheduler = lrs.LambdaLR(optimizer, lambda _: 1.0)
    scale_rates_([(optimizer, [0])], 0.5)
    scale_schedules_([(optimizer, [0])], [scheduler], 0.5)
    assert rates(optimizer) == rates(optimizer, "initial_lr") == [0.25]
    assert scheduler.base_lrs == [torch.tensor(0.25)]


def test_a_base_that_is_the_tensor_of_the_rate_is_scaled_once():
    """As SequentialLR makes them before torch 2.10."""
    optimizer = Adam([nn.Parameter(torch.zeros(1))], lr=torch.tensor(0.5))
    scheduler = lrs.LambdaLR(optimizer, lambda _: 1.0)
    optimizer.param_groups[0]["initial_lr"] = optimizer.param_groups[0]["lr"]
    scheduler.base_lrs = [optimizer.param_groups[0]["lr"]]
    scale_rates_([(optimizer, [0])], 0.5)
    scale_schedules_([(optimizer, [0])], [scheduler], 0.5)
    assert rates(optimizer) == rates(optimizer, "initial_lr") == [0.25]
    assert scheduler.base_lrs == [torch.tensor(0.25)]


class Foreign:
    """Steps rates by itself."""

    def __init__(self, optimizer):
        self.optimizer = optimizer


def test_schedulers_that_are_not_torchs_are_named():
    optimizer = two_groups()
    torchs = [lrs.ReduceLROnPlateau(optimizer), lrs.StepLR(optimizer, 3)]
    assert unknown_schedulers(torchs) == []
    assert unknown_schedulers([*torchs, Foreign(optimizer), Foreign(optimizer)]) == ["Foreign"]


class OwnBases(lrs.LRScheduler):
    """Keeps base rates of its own besides those of torch."""

    def get_lr(self):
        return [0.5 for _ in self.base_lrs]


def test_schedulers_derived_from_torchs_are_named_wherever_they_stand():
    optimizer = two_groups()
    own, lambdas = OwnBases(optimizer), lrs.LambdaLR(optimizer, lambda _: 1.0)
    assert unknown_schedulers([own]) == unknown_schedulers([lrs.ChainedScheduler([lambdas, own])]) == ["OwnBases"]
    assert unknown_schedulers([lambdas]) == []


@pytest.mark.parametrize("tensor", [False, True])
def test_rates_go_back_to_those_before_the_scheduler(tensor):
    optimizer = Adam([nn.Parameter(torch.zeros(1))], lr=torch.tensor(0.5) if tensor else 0.5)
    lrs.LinearLR(optimizer, start_factor=0.25)
    rate = optimizer.param_groups[0]["lr"]
    assert float(rate) == 0.125
    restore_initial_rates_([(optimizer, [0])])
    assert rates(optimizer) == [0.5]
    assert not tensor or optimizer.param_groups[0]["lr"] is rate
    plain = two_groups()
    restore_initial_rates_([(plain, [0, 1])])
    assert rates(plain) == [0.5, 0.25]


def test_the_base_of_a_group_is_what_its_schedule_is_made_of():
    group = {"lr": 0.004, "initial_lr": 0.01, "max_lr": torch.tensor(0.5)}
    assert base_rate(group) == 0.5
    assert base_rate(group, ("lr",)) == 0.004
    assert base_rate({"lr": 0.1, "max_lr": None}) == 0.1


def test_all_groups_are_meant_unless_some_are_named():
    one, other = two_groups(), two_groups()
    assert choose_groups([one, other], None, None) == [(one, [0, 1]), (other, [0, 1])]
    assert choose_groups([one, other], [1], [0]) == [(other, [0])]


@pytest.mark.parametrize(
    ("optimizers", "groups", "said"),
    [
        ([2], None, r"optimizers must hold indices below 2, because the module has 2; got \[2\]. Remove 2"),
        ([0, 5, 7], None, "Remove 5, 7"),
        (None, [0, 2], r"X: param_groups must hold indices below 2, because optimizer 0 has 2; got \[0, 2\]. Remove 2"),
        ([-1], None, "Remove -1"),
    ],
)
def test_what_is_not_there_is_said(optimizers, groups, said):
    with pytest.raises(ValueError, match=said):
        choose_groups([two_groups(), two_groups()], optimizers, groups)


def test_what_has_no_rate_is_said():
    optimizer = two_groups()
    optimizer.param_groups[1]["lr"] = None
    with pytest.raises(ValueError, match=r"group 1 of optimizer 0 \(SGD\) has none: its lr is None"):
        choose_groups([optimizer], None, None)
    assert choose_groups([optimizer], None, [0]) == [(optimizer, [0])]
    with pytest.raises(ValueError, match="configure_optimizers returns no optimizer"):
        choose_groups([], None, None)
