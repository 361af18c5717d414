"""G6: a technique composes with what Lightning offers, or refuses."""

from typing import Any

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_grad.testing import (
    BATCH,
    assert_identical,
    fit,
    loaders,
    make_classifier,
    make_data,
    make_trainer,
    on_ranks,
)
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


@pytest.mark.parametrize("technique", BROAD, ids=str)
@pytest.mark.parametrize(
    "arguments",
    [
        {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5, "max_epochs": 2},
        {"precision": "bf16-mixed", "max_steps": 10, "max_epochs": -1, "val_check_interval": 2},
        {"precision": "bf16-true", "max_epochs": 2},
        {"fast_dev_run": True},
    ],
    ids=" ".join,
)
def test_trainer_options(technique, arguments):
    """Options that meet nowhere in Lightning share a run."""
    if "gradient_clip_val" in arguments and technique.works_with.gradient_clip_val.is_no:
        with pytest.raises(ValueError, match="gradient_clip_val=None"):
            fit([technique.build()], **arguments)
        arguments = {**arguments, "gradient_clip_val": None}
    module = make_classifier()
    start = start_of(module)
    if arguments.get("precision") == "bf16-true":
        start = {name: value.bfloat16() for name, value in start.items()}
        inputs, targets = make_data().tensors
        half = DataLoader(TensorDataset(inputs.bfloat16(), targets), BATCH)
        make_trainer(callbacks=[technique.build()], **arguments).fit(module, half, half)
    else:
        fit([technique.build()], module, **arguments)
    assert_trained(module, start)


@pytest.mark.parametrize("technique", BROAD, ids=str)
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # the optimizer rightly skips its first step
def test_fp16_grad_scaler_with_overflow_at_the_start(technique):
    module = make_classifier()
    start = start_of(module)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1000)
    fit([technique.build()], module, max_epochs=2, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert scaler.get_scale() < 2.0**40, "the run was meant to begin with an overflow"
    assert_trained(module, start)


@pytest.mark.parametrize("technique", [*CANONICAL, *DIFFERENT], ids=str)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_manual_optimization_with_two_optimizers(technique, optimizer):
    if optimizer == "sgd" and technique.works_with.no_second_moment.is_no:
        with pytest.raises(ValueError, match="exp_avg_sq"):
            fit([technique.build()], make_classifier(optimizer="sgd", manual=True))
        return
    if technique.works_with.manual_optimization.is_no:
        with pytest.raises(ValueError, match="manual optimization"):
            fit([technique.build()], make_classifier(manual=True))
        return
    module = make_classifier(optimizer=optimizer, manual=True)
    start = start_of(module)
    fit([technique.build()], module)
    assert_trained(module, start)


@pytest.mark.parametrize("technique", [t for t in TECHNIQUES if t.compile], ids=str)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch about its own tracing
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("how", ["module.compile()", "torch.compile(module)"])
def test_compiled_submodules_give_the_same_weights(technique, how):
    module = make_classifier()
    torch._dynamo.reset()
    if how == "module.compile()":
        module.hidden.compile(backend="eager")
        module.encoder.compile(backend="eager")
    else:
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


@pytest.mark.parametrize("technique", BROAD, ids=str)
def test_pytorch_lightning_trainer(technique):
    module = make_classifier(base=pytorch_lightning.LightningModule)
    train, validation = loaders()
    make_trainer(pytorch_lightning.Trainer, callbacks=[technique.build()]).fit(module, train, validation)
    assert_identical(bare(technique).weights, dict(module.state_dict()))


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


def _on_a_rank(technique: Any, strategy: str = "ddp") -> dict[str, torch.Tensor]:
    """Train on two ranks, and return the parameters on this one."""
    module = make_classifier()
    start = start_of(module)
    try:
        fit([technique.build()], module, strategy=strategy, devices=2, max_epochs=2)
        assert_trained(module, start)
    except Exception as error:
        error.add_note(f"Technique: {technique}")
        raise
    return {name: value.detach() for name, value in module.named_parameters()}


def check_two_ranks_agree(*techniques):
    first, second = on_ranks(2, lambda: {str(technique): _on_a_rank(technique) for technique in techniques})
    assert first.keys() == {str(technique) for technique in techniques}
    assert_identical(first, second)


def test_two_ranks_agree():
    check_two_ranks_agree(*BROAD)


@pytest.mark.parametrize("technique", {one.family: one for one in reversed(CANONICAL)}.values(), ids=str)
def test_ranks_that_lightning_forks_give_their_weights_back(technique):
    _on_a_rank(technique, "ddp_fork")


_SHARDING = {"FSDPStrategy": "fsdp1", "DeepSpeedStrategy": "deepspeed", "ModelParallelStrategy": "fsdp2"}


@pytest.mark.parametrize("technique", [*CANONICAL, *(t for t in DIFFERENT if t.works_with.fsdp1.is_no)], ids=str)
@pytest.mark.parametrize("strategy", _SHARDING)
def test_sharded_strategies_work_or_are_refused_before_the_first_batch(technique, strategy):
    stand_in = type(strategy, (pl.strategies.SingleDeviceStrategy,), {})(device=torch.device("cpu"))
    if technique.works_with.answers[_SHARDING[strategy]].is_no:
        with pytest.raises(ValueError, match=f"{strategy}.*[sS]trategy"):
            fit([technique.build()], strategy=stand_in)
    else:
        fit([technique.build()], strategy=stand_in, max_epochs=2)


@pytest.mark.parametrize("technique", CANONICAL, ids=str)
def test_frozen_parameters_stay_what_they_are(technique):
    module = make_classifier()
    module.encoder.requires_grad_(False)
    start = start_of(module)
    chosen = {"include": ["hidden"]} if "include" in technique.arguments else {}
    fit([technique.build(**chosen)], module, max_epochs=2)
    for name, value in module.encoder.state_dict().items():
        assert torch.equal(value, start[f"encoder.{name}"]), name


def test_the_plain_types_are_plain():
    assert nn.Linear in PLAIN_TYPES
