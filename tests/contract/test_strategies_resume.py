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
    make_classifier,
    make_data,
    make_trainer,
    on_ranks,
)
from tests.contract.strategy_settings import BROAD, SCHEMES, Scheme
from tests.strategies.fits import finish, outcome

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:`.fit.ckpt_path=None.` was called without a model"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]


def _paths(folder: Any) -> list[Any]:
    return sorted(folder.glob("*.ckpt"), key=lambda path: torch.load(path, weights_only=True)["global_step"])


def _resume_everywhere(build: Any, module: Any, folder: Any, arguments: dict[str, Any]) -> int:
    every = 4 // dist.get_world_size() // arguments.get("accumulate_grad_batches", 1)  # at the same samples everywhere
    saving = ModelCheckpoint(folder, save_top_k=-1, every_n_train_steps=every)
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


def _resume_accumulating(scheme: Scheme, accumulate: int, folder: Path) -> int:
    arguments = {} if accumulate == 1 else {"accumulate_grad_batches": accumulate}
    return _resume_everywhere(scheme.build, scheme.module, folder, arguments)


ACCUMULATING = [*((scheme, 1) for scheme in SCHEMES if scheme.broad), *((scheme, 2) for scheme in BROAD)]


@pytest.mark.parametrize("case", ACCUMULATING)
def test_resume_at_any_saved_step(case, together):
    found, _ = together(_resume_accumulating, ACCUMULATING, case)
    assert found == [4, 4] if case[1] == 1 else [6, 6]


def _resume_in_half_precision(scheme: Scheme, folder: Path) -> int:
    return _resume_everywhere(scheme.build, scheme.module, folder, {"precision": "bf16-mixed", "limit_val_batches": 0})


def _resume_on_one_rank(scheme: Scheme, folder: Path) -> int:
    return _resume_everywhere(scheme.build, scheme.module, folder, {"limit_val_batches": 0})


EACH = [(scheme,) for scheme in BROAD]


@pytest.mark.parametrize("case", EACH)
def test_resume_in_half_precision(case, together):
    assert together(_resume_in_half_precision, EACH, case)[0] == [4, 4]


@pytest.mark.parametrize("case", EACH)
def test_resume_on_one_rank(case, together):
    assert together(_resume_on_one_rank, EACH, case, 1)[0] == [4]


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


def _stop_anywhere(scheme: Scheme, folder: Path) -> None:
    _stop_and_resume(scheme.build, scheme.optimizer, _HOOKS, [6], _on_exception(folder))


@pytest.mark.parametrize("case", EACH)
def test_resume_from_an_exception_anywhere_in_a_step(case, together):
    together(_stop_anywhere, EACH, case)


def _stop_again_and_again(scheme: Scheme, folder: Path) -> None:
    """Break off between an exchange and its update, resume from what that saved, and break off again at a later step."""
    build, optimizer = scheme.build, scheme.optimizer
    expected = outcome(*_fit_on_one_batch(build(), optimizer, []))
    path = None
    for step in (1, 2, 3, 7):
        saving = ModelCheckpoint(folder, str(step), save_on_exception=True, every_n_epochs=100)
        callbacks = [StopIn("on_before_optimizer_step", step), saving]
        with pytest.raises(RuntimeError, match="on purpose"):
            _fit_on_one_batch(build(), optimizer, callbacks, path)
        dist.barrier()
        path = folder / f"{step}.ckpt"
    assert_identical(expected, outcome(*_fit_on_one_batch(build(), optimizer, [], path)))


ALL = [(scheme,) for scheme in SCHEMES]


@pytest.mark.parametrize("case", ALL)
def test_resume_from_an_exception_between_an_exchange_and_its_update(case, together):
    """Early, where the warm-up turns, and in mid-run: the message that was in flight is used again."""
    together(_stop_again_and_again, ALL, case)
