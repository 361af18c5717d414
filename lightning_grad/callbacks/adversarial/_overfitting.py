"""Accuracy of a module on one batch under two attacks, to detect overfitting to the attack of the training."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_grad.callbacks.adversarial._attack import Attack, NoLossError, attack_losses, generator_for
from lightning_grad.callbacks.adversarial._places import Place
from lightning_grad.core.quiet import quiet
from lightning_grad.core.ranks import mean_over_ranks
from lightning_grad.functional import LossCapture
from lightning_grad.functional.adversarial.attacks import IndependentLossError
from lightning_grad.functional.data_pruning.scores import is_correct
from lightning_grad.utilities.batch_copies import copy_of
from lightning_grad.utilities.reporting import first_sentence

_STEPS = 10  # steps of the stronger attack
_COLLAPSE = 0.5  # warn if the stronger attack leaves less than this share of the accuracy under the training attack,
_GAP = 0.3  # and the accuracies differ by more than this, which small batches do not by chance


class _UnknownAccuracyError(RuntimeError):
    """The step does not show how it classifies its batch."""


@dataclass
class OverfittingCheck:
    """Classifies one batch of an epoch under the attack of the training, and under a stronger one.

    Args:
        attack: The attack of the training.
        seed: Seed of the random starts.
        display_name: Name of the callback in messages.
    """

    attack: Attack
    seed: int
    display_name: str
    _kept: tuple[Place, Any, Any, Any] | None = field(default=None, init=False)
    _has_reported: bool = field(default=False, init=False)

    def keep(self, place: Place, batch: Any, args: Any, kwargs: Any) -> None:
        """Store the arguments of the first step of an epoch and the place of its input."""
        if self._kept is None:
            self._kept = (place, copy_of(batch), args, kwargs)

    def forget(self) -> None:
        """Drop the stored step at the end of an epoch."""
        self._kept = None

    def run(self, trainer: pl.Trainer) -> dict[str, float]:
        """Return the known accuracies by name, and warn if the one under the stronger attack is much lower.

        Call it on every rank, including ranks that have stored no step.
        """
        names, found = ("attack_accuracy", "pgd_accuracy"), [math.nan, math.nan]
        if self._kept is not None:
            attacks = (self.attack, replace(self.attack, steps=_STEPS, step_size=None))
            purposes = [f"{self.seed}/{trainer.current_epoch}/{name}" for name in names]
            try:
                with quiet(trainer, trainer.lightning_module, check=False, display_name=self.display_name):
                    found = self._accuracies(trainer, dict(zip(purposes, attacks, strict=True)), *self._kept)
            except _UnknownAccuracyError as error:
                self._report_unknown(error)
        easy, robust = mean_over_ranks(trainer, torch.tensor(found)).tolist()
        if robust < _COLLAPSE * easy and easy - robust > _GAP:
            rank_zero_warn(
                f"{self.display_name}: the accuracy on one batch is {easy:.1%} under the attack of the training, but "
                f"{robust:.1%} under PGD with {_STEPS} steps: the network has overfitted to the attack. Train with "
                "attack='pgd', or a smaller step_size or epsilon."
            )
        return {name: mean for name, mean in zip(names, (easy, robust), strict=True) if math.isfinite(mean)}

    def _accuracies(
        self, trainer: pl.Trainer, attacks: dict[str, Attack], place: Place, batch: Any, args: Any, kwargs: Any
    ) -> list[float]:
        """Return the accuracy under each attack; the keys of ``attacks`` seed the random numbers."""

        def run(shown: Any) -> Any:
            with trainer.precision_plugin.train_step_context():
                return trainer.lightning_module.training_step(shown, *args, **kwargs)

        clean = place.inputs(batch, run)
        loss_of = attack_losses(trainer, place, batch, run)
        found: list[Tensor] = []
        for purpose, attack in attacks.items():
            generator = generator_for(clean.device, trainer.global_rank, purpose)
            try:
                attacked = attack(loss_of, clean, generator, place.support(batch))
            except (NoLossError, IndependentLossError) as error:
                raise _UnknownAccuracyError(str(error)) from None
            # With gradients, because a step may compute some itself, such as a gradient penalty.
            with place.shown(copy_of(batch), attacked) as shown, torch.enable_grad(), LossCapture() as capture:
                run(shown)
            try:
                found.append(is_correct(capture.only()).nanmean())
            except (RuntimeError, ValueError) as error:
                raise _UnknownAccuracyError(f"{first_sentence(error)}.") from None
        return [float(accuracy) for accuracy in found]

    def _report_unknown(self, error: _UnknownAccuracyError) -> None:
        if not self._has_reported:
            rank_zero_info(
                f"{self.display_name} skips the accuracies of check_every_n_epochs: {error} Use "
                "AdversarialEvaluation to measure the metrics that the module logs, or set check_every_n_epochs=None "
                "to turn the check off."
            )
        self._has_reported = True
