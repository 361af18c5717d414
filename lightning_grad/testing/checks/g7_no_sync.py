"""G7: between two log steps the callback does not make the host wait for the device."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch

from lightning_grad.testing.checks.registry import check
from lightning_grad.testing.subject import NotApplicableError, Subject
from lightning_grad.testing.syncs import GuardStep, SyncError, guarded

_PER_STEP = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)
_REGISTER = ("register_step_pre_hook", "register_step_post_hook")


@check("quick")
def g7_no_host_sync(subject: Subject) -> str:
    """Hooks of a step, hooks of the optimizer, and what is wrapped around the training step and backward do not wait.

    The first call of each may: it may find out what it needs for all steps.
    """
    module_waits = _waits(subject.plain)
    (callback,), seen = subject.built(), list[str]()
    reason = getattr(callback, "syncs_per_step", "")
    if reason:
        raise NotApplicableError(f"It declares syncs_per_step: {reason}")
    with ExitStack() as stack:
        for name in _PER_STEP:
            hook = guarded(getattr(callback, name), seen, name)
            stack.enter_context(patch.object(callback, name, hook))
        for name in _REGISTER:
            stack.enter_context(patch.object(torch.optim.Optimizer, name, _registering_guarded(name, seen)))
        guards = [] if module_waits else [GuardStep(seen)]
        # The guards are slow: steps of all epochs, but not all steps.
        subject.run([callback], guards, log_every_n_steps=10_000, limit_train_batches=3)
    assert {"on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end"} <= set(seen)
    return "Only hooks were checked: the module itself waits in its training step." if module_waits else ""


def _waits(plain: Subject) -> bool:
    """Return whether the module's own step waits: one that steps its optimizers itself reads their step counts."""
    kept = vars(plain.project)
    if "waits" not in kept:
        try:
            plain.run([], [GuardStep([])], log_every_n_steps=10_000)
            kept["waits"] = False
        except SyncError:
            kept["waits"] = True
    return bool(kept["waits"])


def _registering_guarded(name: str, seen: list[str]) -> Any:
    register = getattr(torch.optim.Optimizer, name)

    def guarding(optimizer: Any, hook: Any) -> Any:
        return register(optimizer, guarded(hook, seen, name))

    return guarding
