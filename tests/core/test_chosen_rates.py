"""Rates that are scaled for the rest of a run: up, down to a floor, with their schedulers."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from lightning_grad.core import ChosenRates


def a_trainer(*rates: float) -> Any:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates]
    optimizer = torch.optim.SGD(groups)
    scheduler = LambdaLR(optimizer, lambda step: 1.0)
    return SimpleNamespace(optimizers=[optimizer], lr_scheduler_configs=[SimpleNamespace(scheduler=scheduler)])


def step(trainer: Any) -> list[float]:
    trainer.optimizers[0].step()
    trainer.lr_scheduler_configs[0].scheduler.step()
    return [group["lr"] for group in trainer.optimizers[0].param_groups]


def test_rates_go_up_and_down_and_schedulers_go_on_from_them() -> None:
    trainer, rates = a_trainer(0.1, 0.02), ChosenRates()
    rates.begin(trainer)
    assert rates.multiply(trainer, 4.0)
    assert step(trainer) == [0.4, 0.08]
    assert rates.multiply(trainer, 0.5)
    assert step(trainer) == [0.2, 0.04]
    assert rates.scale == 2.0
    assert not rates.multiply(trainer, 1.0)
    assert step(trainer) == [0.2, 0.04]


def test_the_floor_stops_what_goes_down_and_not_what_goes_up() -> None:
    trainer, rates = a_trainer(0.1), ChosenRates(min_lr=0.03)
    rates.begin(trainer)
    assert rates.multiply(trainer, 0.1)
    assert step(trainer) == pytest.approx([0.03])
    assert not rates.multiply(trainer, 0.1)
    assert rates.multiply(trainer, 2.0)
    assert rates.first(trainer) == pytest.approx(0.06)


def test_a_floor_above_the_rate_raises_nothing() -> None:
    trainer, rates = a_trainer(0.1), ChosenRates(min_lr=0.5)
    rates.begin(trainer)
    assert not rates.multiply(trainer, 0.5)
    assert rates.first(trainer) == 0.1


def test_only_chosen_groups_are_scaled() -> None:
    trainer, rates = a_trainer(0.1, 0.02), ChosenRates(groups=[1])
    rates.begin(trainer)
    rates.multiply(trainer, 0.5)
    assert step(trainer) == [0.1, 0.01]
    with pytest.raises(ValueError, match=r"Mine: param_groups must hold indices below 2.*; got \[2\]"):
        ChosenRates(groups=[2], needed_by="Mine").first(trainer)
