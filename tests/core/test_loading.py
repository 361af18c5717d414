"""Steps with which torch prepares an optimizer for the state of a sharded checkpoint."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from lightning_grad.core.steps.loading import hide_steps_of_loading


class Strategy:
    """Steps its first optimizer when it loads; the second is no torch optimizer, as that of DeepSpeed's engine."""

    def __init__(self) -> None:
        self.optimizers: list[Any] = [torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1), object()]

    def load_checkpoint(self, path: str) -> str:
        self.optimizers[0].step()
        return path


def test_no_hook_sees_the_steps_of_loading() -> None:
    strategy, seen = Strategy(), []
    for register in ("register_step_pre_hook", "register_step_post_hook"):
        getattr(strategy.optimizers[0], register)(lambda *_: seen.append("step"))
    undo = hide_steps_of_loading(SimpleNamespace(strategy=strategy))  # type: ignore[arg-type]
    assert strategy.load_checkpoint("file") == "file"
    assert seen == []
    strategy.optimizers[0].step()
    assert seen == ["step", "step"]
    undo()
    strategy.load_checkpoint("file")
    assert seen == ["step"] * 4
