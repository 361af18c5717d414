"""The names by which a Trainer knows the strategies."""

from typing import Any

import lightning.pytorch as pl
import pytest
import pytorch_lightning
from lightning.pytorch.strategies import StrategyRegistry
from torch import nn

from lightning_grad.strategies import (
    DGCStrategy,
    DiLoCoStrategy,
    LocalSGDStrategy,
    OneBitAdamStrategy,
    PowerSGDStrategy,
)
from lightning_grad.strategies.registry import register_strategies
from lightning_grad.testing import fit, make_classifier, make_trainer

NAMES = {
    "ddp_dgc": DGCStrategy,
    "ddp_powersgd": PowerSGDStrategy,
    "ddp_onebit_adam": OneBitAdamStrategy,
    "ddp_local_sgd": LocalSGDStrategy,
    "ddp_diloco": DiLoCoStrategy,
}
STARTS = {"": "popen", "_fork": "fork", "_spawn": "spawn"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("suffix", STARTS)
def test_every_name_builds_its_strategy(name, suffix):
    strategy = make_trainer(strategy=name + suffix, devices=2).strategy
    assert type(strategy) is NAMES[name]
    assert strategy.settings == NAMES[name](start_method=STARTS[suffix]).settings
    assert strategy._start_method == STARTS[suffix]
    assert strategy.num_processes == 2


def test_names_can_be_registered_twice():
    before = StrategyRegistry.available_strategies()
    register_strategies()
    assert StrategyRegistry.available_strategies() == before


def test_every_name_is_described():
    for name, cls in NAMES.items():
        for suffix, start in STARTS.items():
            description = StrategyRegistry[name + suffix]["description"]
            assert cls.__name__ in description
            assert start in description


def test_names_of_lightning_stay_what_they_were():
    assert type(make_trainer(strategy="ddp_fork", devices=2).strategy) is pl.strategies.DDPStrategy


@pytest.mark.filterwarnings("ignore:.*everything is sent dense")
@pytest.mark.parametrize("name", NAMES)
def test_a_fit_by_name(name):
    is_dense = name == "ddp_onebit_adam"  # for its first thousand updates
    module = make_classifier(optimizer="adamw" if is_dense else "sgd")
    module.large = nn.Linear(64, 64)  # more than the default min_numel
    module.head = nn.Sequential(nn.Linear(32, 64), module.large, nn.Linear(64, 4))
    trainer, _ = fit([], module, strategy=f"{name}_fork", devices=2, max_epochs=1)
    assert trainer.callback_metrics["comm/ratio"] > (0.999 if is_dense else 1)


def test_an_unknown_name_is_refused_by_lightning():
    with pytest.raises(ValueError, match="invalid strategy name: `strategy='ddp_dcg'`"):
        make_trainer(strategy="ddp_dcg", devices=2)


@pytest.mark.parametrize("cls", NAMES.values())
def test_a_trainer_of_the_other_namespace_refuses_them_in_its_own_words(cls: Any):
    """The two namespaces of Lightning share no base class of strategies; there is nothing to do about it here."""
    with pytest.raises(ValueError, match="You selected an invalid strategy"):
        make_trainer(pytorch_lightning.Trainer, strategy=cls(), devices=2)
    with pytest.raises(ValueError, match="invalid strategy name"):
        make_trainer(pytorch_lightning.Trainer, strategy="ddp_dgc", devices=2)
