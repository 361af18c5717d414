"""What is multiplied by an fp16 loss scale is seen and undone."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lightning_grad.utilities.precision import gradients_are_scaled, true_loss

SCALER = torch.amp.GradScaler("cpu", init_scale=1024.0)


def trainer_with(optimizer: torch.optim.Optimizer, scaler: Any) -> SimpleNamespace:
    return SimpleNamespace(precision_plugin=SimpleNamespace(scaler=scaler), optimizers=[optimizer])


@pytest.mark.parametrize(("fused", "scaler"), [(True, None), (True, SCALER), (False, None), (False, SCALER)])
def test_gradients_are_scaled_only_where_a_fused_optimizer_meets_a_scaler(fused: bool, scaler: Any) -> None:
    optimizer = torch.optim.AdamW(nn.Linear(2, 2).parameters(), fused=fused)
    assert gradients_are_scaled(trainer_with(optimizer, scaler), optimizer) is (fused and scaler is not None)


@pytest.mark.parametrize(("automatic", "expected"), [(True, 6.0), (False, 2.0)])
def test_the_loss_of_the_training_step_is_found_again(automatic: bool, expected: float) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    seen = scaler.scale(torch.tensor(2.0))
    trainer = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=scaler), accumulate_grad_batches=3)
    assert true_loss(trainer, SimpleNamespace(automatic_optimization=automatic), seen).item() == expected
