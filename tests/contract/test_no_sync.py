"""G7: between two log steps nothing of ours makes the host wait for the device, in a hook or around training_step."""

from typing import Any

import pytest
import torch

from lightning_grad.testing import GuardStep, NoSync, fit, guarded, make_classifier
from tests.contract.settings import TECHNIQUES

_PER_STEP = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


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
