"""G5 of strategies: stop anywhere, resume, and get bitwise the uninterrupted run on every rank."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_grad.testing import (
    BATCH,
    StopIn,
    StopInTrainingStep,
    assert_identical,
    finish,
    make_classifier,
    make_data,
    make_trainer,
    on_ranks,
    outcome,
)
from tests.contract.strategy_settings import CANONICAL, SCHEMES

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:`.fit.ckpt_path=None.` was called without a model"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]


def _paths(folder: Any) -> list[Any]:
    return sorted(folder.glob("*.ckpt"), key=lambda path: torch.load(path, weights_only=True)["global_step"])


def _resume_everywhere(build: Any, module: Any, folder: Any, arguments: dict[str, Any]) -> int:
    saving = ModelCheckpoint(
        folder, save_top_k=-1, every_n_train_steps=2 // arguments.get("accumulate_grad_batches", 1)
    )
    expected = finish(build(), [saving], module=module(), **arguments)
    for path in _paths(folder):
        resumed = finish(build(), module=module(), ckpt=path, **arguments)
        assert_identical(expected, resumed, path.name)
    return len(_paths(folder))


def test_ddp_itself_resumes_bitwise(tmp_path):
    """The premise: these loaders and modules make Lightning itself exact, also in mid-epoch."""
    assert on_ranks(2, _resume_everywhere, lambda: "ddp", _sgd, tmp_path, {}) == [4, 4]


def _sgd() -> Any:
    return make_classifier(optimizer="sgd")


@pytest.mark.parametrize(("scheme", "accumulate"), [*((s, 1) for s in SCHEMES), *((s, 2) for s in CANONICAL)], ids=str)
def test_resume_at_any_saved_step(scheme, accumulate, tmp_path):
    arguments = {} if accumulate == 1 else {"accumulate_grad_batches": accumulate}
    found = on_ranks(2, _resume_everywhere, scheme.build, scheme.module, tmp_path, arguments)
    assert found == [4, 4] if accumulate == 1 else [6, 6]


@pytest.mark.parametrize("arguments", [{"precision": "bf16-mixed"}, {"devices": 1}], ids=str)
@pytest.mark.parametrize("scheme", CANONICAL, ids=str)
def test_resume_in_half_precision_and_on_one_rank(scheme, arguments, tmp_path):
    on_ranks(arguments.get("devices", 2), _resume_everywhere, scheme.build, scheme.module, tmp_path, arguments)


def _fit_on_one_batch(strategy: Any, optimizer: str, callbacks: list[Any], ckpt: Any = None) -> tuple[Any, Any]:
    """Fit without anything that a forward pass changes, on batches that are all the same.

    So that a step which is run again is, for DDP itself, the step that it was. The steps that are logged are not: Lightning
    counts the one that was broken off twice.
    """
    if hasattr(strategy, "log_noise_scale"):
        strategy.log_noise_scale = False
    module = make_classifier(optimizer=optimizer)
    module.norm = nn.Identity()
    x, y = make_data(seed=dist.get_rank()).tensors
    data = DataLoader(TensorDataset(x[:BATCH].repeat(4, 1, 1), y[:BATCH].repeat(4)), BATCH)
    saves = any(isinstance(callback, pl.callbacks.Checkpoint) for callback in callbacks)
    trainer = make_trainer(
        strategy=strategy,
        devices=dist.get_world_size(),
        callbacks=callbacks,
        max_epochs=3,
        use_distributed_sampler=False,
        enable_checkpointing=saves,
    )
    trainer.fit(module, data, ckpt_path=ckpt)
    return trainer, module


def _stop_and_resume(build: Any, optimizer: str, hooks: Sequence[str], steps: Sequence[int], saving: Any) -> None:
    expected = outcome(*_fit_on_one_batch(build(), optimizer, []))
    for hook, step in itertools.product(hooks, steps):
        stop = StopInTrainingStep(step) if hook == "training_step" else StopIn(hook, step)
        folder, last = saving(f"{hook}-{step}")
        with pytest.raises(RuntimeError, match="on purpose"):
            _fit_on_one_batch(build(), optimizer, [stop, last])
        dist.barrier()
        (path,) = _paths(folder)
        assert_identical(expected, outcome(*_fit_on_one_batch(build(), optimizer, [], path)), f"{hook} at {step}")


_HOOKS = (
    "on_train_batch_start",
    "training_step",
    "on_before_zero_grad",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


def _on_exception(folder: Path) -> Any:
    return lambda name: (folder / name, OnExceptionCheckpoint(folder / name))


def test_ddp_itself_resumes_bitwise_from_an_exception(tmp_path):
    on_ranks(2, _stop_and_resume, lambda: "ddp", "sgd", _HOOKS, [6], _on_exception(tmp_path))


@pytest.mark.parametrize("scheme", CANONICAL, ids=str)
def test_resume_from_an_exception_anywhere_in_a_step(scheme, tmp_path):
    on_ranks(2, _stop_and_resume, scheme.build, scheme.optimizer, _HOOKS, [6], _on_exception(tmp_path))


def _stop_again_and_again(build: Any, optimizer: str, steps: Sequence[int], folder: Path) -> None:
    """Break off between an exchange and its update, resume from what that saved, and break off again at the next step."""
    expected = outcome(*_fit_on_one_batch(build(), optimizer, []))
    path = None
    for step in steps:
        saving = ModelCheckpoint(folder, str(step), save_on_exception=True, every_n_epochs=100)
        callbacks = [StopIn("on_before_optimizer_step", step), saving]
        with pytest.raises(RuntimeError, match="on purpose"):
            _fit_on_one_batch(build(), optimizer, callbacks, path)
        dist.barrier()
        path = folder / f"{step}.ckpt"
    assert_identical(expected, outcome(*_fit_on_one_batch(build(), optimizer, [], path)))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_resume_from_an_exception_between_an_exchange_and_its_update(scheme, tmp_path):
    """Early, where the warm-up turns, and in mid-run: the message that was in flight is used again."""
    on_ranks(2, _stop_again_and_again, scheme.build, scheme.optimizer, (1, 2, 3, 7), tmp_path)
