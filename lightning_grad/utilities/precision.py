"""Losses and gradients under an fp16 GradScaler, with and without its scale."""

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_grad.functional.plain_tensors import on_plain_tensors, plain_tensor


def grad_scaler(trainer: pl.Trainer) -> torch.amp.GradScaler | None:
    """Return the trainer's GradScaler, or ``None`` if it has none or it is disabled."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def loss_scale(trainer: pl.Trainer, device: torch.device) -> Tensor | float:
    """Return the factor of losses on a device, 1 without a GradScaler."""
    scaler = grad_scaler(trainer)
    if scaler is None or not scaler.is_enabled():
        return 1.0
    return scaler._init_scale if scaler._scale is None else scaler._scale.to(device)  # it exists from the first step on


@on_plain_tensors
def true_loss(trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> Tensor:
    """Recover the loss that ``training_step`` returned from the loss that ``on_before_backward`` gets.

    The latter is divided by the number of accumulated batches and multiplied by the loss scale.
    """
    batches = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
    return plain_tensor(loss).detach() * batches / loss_scale(trainer, loss.device)


def gradients_are_scaled(trainer: pl.Trainer, optimizer: Optimizer) -> bool:
    """Return True if callbacks see scaled gradients, because a fused optimizer unscales inside its step."""
    return grad_scaler(trainer) is not None and bool(getattr(optimizer, "_step_supports_amp_scaling", False))
