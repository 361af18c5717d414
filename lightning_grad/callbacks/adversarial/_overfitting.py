"""How a module classifies one batch under several attacks: shows when training has overfitted to the attack it uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_grad.callbacks.adversarial._attack import Attack, attack_losses, generator_for
from lightning_grad.callbacks.adversarial._places import Place
from lightning_grad.functional import LossCapture, is_correct


def accuracies_under(
    attacks: Mapping[str, Attack],
    trainer: pl.Trainer,
    place: Place,
    batch: Any,
    run: Callable[[Any], Any],
    purpose: str,
) -> dict[str, float]:
    """Return the accuracy on one batch under each attack, a mean over ranks; inside of ``quiet``.

    Args:
        attacks: Attacks by name.
        trainer: The trainer.
        place: Where the input is.
        batch: The batch.
        run: Runs the step on a batch.
        purpose: What the random numbers are for.

    Returns:
        dict: Accuracies by name; empty if the step shows no loss of a classifier.
    """
    clean = place.inputs(batch, run)
    loss_of = attack_losses(trainer, place, batch, run)
    found = {}
    for name, attack in attacks.items():
        attacked = attack(loss_of, clean, generator_for(clean.device, trainer.global_rank, f"{purpose}/{name}"))
        with place.shown(batch, attacked) as shown, torch.no_grad(), LossCapture() as capture:
            run(shown)
        try:
            correct = is_correct(capture.only()).nanmean()
        except (RuntimeError, ValueError):
            return {}
        found[name] = float(trainer.strategy.reduce(correct, reduce_op="mean"))
    return found
