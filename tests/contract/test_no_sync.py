"""G7: between two log steps nothing of ours makes the host wait for the device, in a hook or around training_step."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.contract.projects import fit, make_classifier
from tests.contract.settings import TECHNIQUES

_SYNCING = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
}
_PER_STEP = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


class NoSync(TorchDispatchMode):
    """Raises where a value would be read on the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _SYNCING:
            raise AssertionError(f"{func} waits for the device")
        if func is torch.ops.aten._to_copy.default and "device" in kwargs:
            raise AssertionError(f"copies to {kwargs['device']}")
        return func(*args, **kwargs)


def guarded(function: Any, seen: list[str], name: str) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        seen.append(name)
        if seen.count(name) == 1:  # once, what a technique needs to know for all steps may be looked at
            return function(*args, **kwargs)
        with NoSync():
            return function(*args, **kwargs)

    return call


class GuardStep(pl.Callback):
    """Guards the training step with all that is wrapped around it."""

    def __init__(self, seen: list[str]) -> None:
        self.seen = seen

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.training_step = guarded(pl_module.training_step, self.seen, "training_step")


@pytest.mark.parametrize("technique", TECHNIQUES, ids=str)
def test_hooks_of_a_step_do_not_wait(technique, monkeypatch):
    callback, seen = technique.build(), []
    if hasattr(callback, "syncs_per_step"):
        assert len(callback.syncs_per_step) > 20, "what it waits for, and why"
        return
    for name in _PER_STEP:
        monkeypatch.setattr(callback, name, guarded(getattr(callback, name), seen, name))
    for name in ("register_step_pre_hook", "register_step_post_hook"):
        original = getattr(torch.optim.Optimizer, name)

        def register(self: Any, hook: Any, original: Any = original, name: str = name) -> Any:
            return original(self, guarded(hook, seen, name))

        monkeypatch.setattr(torch.optim.Optimizer, name, register)
    fit([callback, GuardStep(seen)], make_classifier(), log_every_n_steps=10_000)
    assert {"training_step", "on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end"} <= set(seen)


def test_the_guard_sees_a_sync():
    with NoSync(), pytest.raises(AssertionError, match="waits"):
        torch.ones(1).item()
