"""Runs in which ranks cannot train apart. Used by ``_local_steps.py``; most others are in ``Compatibility``."""

import math

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_grad.core.averaging import techniques_that_average
from lightning_grad.core.progress import IN_FIRST_EPOCH
from lightning_grad.strategies._collectives import Collectives


def refuse_synchronized_statistics(display_name: str, pl_module: pl.LightningModule, is_asked: bool) -> None:
    """Raise if the module has SyncBatchNorm, or will get it because the Trainer is asked for it."""
    layers = [name for name, child in pl_module.named_modules() if isinstance(child, nn.SyncBatchNorm)]
    if layers or is_asked:
        which = f" ({layers[0]})" if layers else ""
        raise ValueError(
            f"{display_name} lets ranks train apart, and SyncBatchNorm{which} exchanges statistics in every forward pass. "
            "Use BatchNorm, whose statistics the strategy averages: set sync_batchnorm=False."
        )


def refuse_averages(display_name: str, trainer: pl.Trainer) -> None:
    """Raise if a callback or an optimizer replaces the trained weights by averages."""
    for name in techniques_that_average(trainer):
        raise ValueError(
            f"{display_name} does not work with {name}, which averages the weights of each rank after its own steps, so "
            "ranks would validate different models. The weights of an exchange are an average already. Remove it, or use "
            "strategy='ddp'."
        )


def refuse_endless(display_name: str, trainer: pl.Trainer, dense_fraction: float) -> None:
    """Raise if the run has no length, of which a share could be dense; report if the first epoch measures it."""
    has_length = math.isfinite(trainer.num_training_batches)
    if trainer.max_steps != -1 or (has_length and trainer.max_epochs != -1):
        return
    if trainer.max_epochs in (-1, 1):
        raise ValueError(
            f"{display_name}(dense_fraction={dense_fraction:g}) needs the length of the run, and this run has no known end. "
            "Set max_steps of the Trainer, max_epochs if the data has a length, or dense_fraction=0."
        )
    rank_zero_info(f"{display_name} {IN_FIRST_EPOCH}; all steps of the first epoch are dense.")


def refuse_uneven_batches(display_name: str, trainer: pl.Trainer, ranks: Collectives) -> None:
    """Raise on all ranks if they have different numbers of batches: at the end, some would wait for others."""
    batches = trainer.num_training_batches
    own = torch.tensor([batches, -batches], dtype=torch.float64, device=trainer.strategy.root_device)
    most, least = ranks.maximum_(own, counted=False).tolist()
    if most != -least:
        raise ValueError(
            f"{display_name} needs the same number of batches on every rank, but they have {-least:g} to {most:g}. Use a "
            "sampler that divides the data evenly, or set limit_train_batches."
        )
