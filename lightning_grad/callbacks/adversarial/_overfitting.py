"""How a module classifies one batch under several attacks: shows when training has overfitted to the attack it uses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_grad.callbacks.adversarial._attack import (
    Attack,
    NoLossError,
    attack_losses,
    first_sentence,
    generator_for,
)
from lightning_grad.callbacks.adversarial._places import Place
from lightning_grad.core.ranks import mean_over_ranks
from lightning_grad.functional import LossCapture
from lightning_grad.functional.adversarial.attacks import IndependentLossError
from lightning_grad.functional.data_pruning.scores import is_correct
from lightning_grad.utilities.batch_copies import copy_of

_COLLAPSE = 0.5  # of the accuracy under the attack of the training
_GAP = 0.3  # between the two; on small batches they differ by less


class UnknownAccuracyError(RuntimeError):
    """A step does not show how it classifies its batch."""


def accuracies_under(
    attacks: Mapping[str, Attack],
    place: Place,
    batch: Any,
    run: Callable[[Any], Any],
    trainer: pl.Trainer,
    purpose: str,
) -> dict[str, Tensor]:
    """Return the accuracy on one batch under each attack; inside of ``quiet``.

    Args:
        attacks: Attacks by name.
        place: Where the input is.
        batch: The batch.
        run: Runs the step on a batch.
        trainer: The trainer.
        purpose: What the random numbers are for.

    Returns:
        dict: Accuracies by name.

    Raises:
        UnknownAccuracyError: If the step shows no loss of a classifier, or one that no attack moves.
    """
    clean = place.inputs(batch, run)
    loss_of = attack_losses(trainer, place, batch, run)
    found = {}
    for name, attack in attacks.items():
        generator = generator_for(clean.device, trainer.global_rank, f"{purpose}/{name}")
        try:
            attacked = attack(loss_of, clean, generator, support=place.support(batch))
        except (NoLossError, IndependentLossError) as error:
            raise UnknownAccuracyError(str(error)) from None
        # With gradients: a step may take some itself, as a gradient penalty does.
        with place.shown(copy_of(batch), attacked) as shown, torch.enable_grad(), LossCapture() as capture:
            run(shown)
        try:
            found[name] = is_correct(capture.only()).nanmean()
        except (RuntimeError, ValueError) as error:
            raise UnknownAccuracyError(f"{first_sentence(error)}.") from None
    return found


def known_accuracies(trainer: pl.Trainer, found: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, float]:
    """Return the means over the ranks that have an accuracy; to be called on every rank, also by one that has none."""
    own = [float(found.get(name, math.nan)) for name in names]
    means = zip(names, mean_over_ranks(trainer, torch.tensor(own)).tolist(), strict=True)
    return {name: mean for name, mean in means if math.isfinite(mean)}


def warn_of_collapse(easy: float, robust: float, steps: int, label: str) -> None:
    """Warn if a network withstands the attack that it trains on, but not a stronger one.

    Args:
        easy: The accuracy under the attack of the training.
        robust: That under PGD.
        steps: Steps of the latter.
        label: Who warns.
    """
    if robust < _COLLAPSE * easy and easy - robust > _GAP:
        rank_zero_warn(
            f"{label}: the accuracy on one batch is {easy:.1%} under the attack of the training, but {robust:.1%} under PGD "
            f"with {steps} steps: the network has overfitted to the attack. Train with attack='pgd', or a smaller step_size "
            "or epsilon."
        )
