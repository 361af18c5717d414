"""G6: what a technique composes with beyond what one callback alone is held to."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_grad.testing import fit, make_classifier
from tests.contract.recorded import bare
from tests.contract.settings import BROAD, CANONICAL, DIFFERENT, TECHNIQUES

PLAIN_TYPES = {type(child) for child in list(make_classifier().modules())[1:]}


def assert_trained(module: Any, start: dict[str, torch.Tensor]) -> None:
    for name, value in module.state_dict().items():
        assert torch.isfinite(value).all(), name
    assert any(not torch.equal(value, start[name]) for name, value in module.state_dict().items())
    assert {type(child) for child in list(module.modules())[1:]} <= PLAIN_TYPES


def start_of(module: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("technique", [t for t in TECHNIQUES if t.compile], ids=str)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch about its own tracing
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_module_in_torch_compile_gives_the_same_weights(technique: Any) -> None:
    module = make_classifier()
    torch._dynamo.reset()
    module.hidden = torch.compile(module.hidden, backend="eager")
    fit([technique.build()], module)
    expected = bare(technique).weights
    for name, value in module.state_dict().items():
        assert torch.allclose(value, expected[name.replace("_orig_mod.", "")], atol=1e-6), name


@pytest.mark.parametrize("technique", [t for t in CANONICAL if t.compile], ids=str)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*is deprecated. Please switch to `torch.compile`")
@pytest.mark.filterwarnings("ignore:Skipping serialization of skipfiles_inline_module_allowlist")  # by torch 2.6
def test_inductor(technique):
    module = make_classifier()
    start = start_of(module)
    torch._dynamo.reset()
    module.hidden.compile()
    fit([technique.build()], module, max_epochs=2)
    assert_trained(module, start)


@pytest.mark.parametrize("technique", [t for t in BROAD if t.second is not None], ids=str)
def test_two_instances(technique):
    second = type(technique)(technique.name, arguments=technique.second)
    module = make_classifier()
    start = start_of(module)
    trainer, _ = fit([technique.build(), second.build()], module, max_epochs=2)
    assert_trained(module, start)
    names = {callback.display_name for callback in trainer.callbacks if hasattr(callback, "settings")}
    assert len(names) == 2
    assert any(technique.second["name"] in key.split("/") for key in trainer.callback_metrics)


@pytest.mark.parametrize("technique", {one.family: one for one in reversed(CANONICAL)}.values(), ids=str)
def test_ranks_that_lightning_forks_give_their_weights_back(technique: Any) -> None:
    module = make_classifier()
    start = start_of(module)
    fit([technique.build()], module, strategy="ddp_fork", devices=2, max_epochs=2)
    assert_trained(module, start)


_SHARDING = {"FSDPStrategy": "fsdp1", "DeepSpeedStrategy": "deepspeed", "ModelParallelStrategy": "fsdp2"}


@pytest.mark.parametrize("technique", [*CANONICAL, *(t for t in DIFFERENT if t.works_with.fsdp1.is_no)], ids=str)
@pytest.mark.parametrize("strategy", ["FSDPStrategy", "DeepSpeedStrategy"])  # of the third, real ones are tested
def test_sharded_strategies_work_or_are_refused_before_the_first_batch(technique, strategy):
    stand_in = type(strategy, (pl.strategies.SingleDeviceStrategy,), {})(device=torch.device("cpu"))
    if technique.works_with.answers[_SHARDING[strategy]].is_no:
        with pytest.raises(ValueError, match=f"{strategy}.*[sS]trategy"):
            fit([technique.build()], strategy=stand_in)
    else:
        fit([technique.build()], strategy=stand_in, max_epochs=2)


def test_the_plain_types_are_plain() -> None:
    assert nn.Linear in PLAIN_TYPES
