"""Finding the inputs, near those of an evaluation batch, for which the loss is highest."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_grad.callbacks.adversarial._attack import Attack, NoLossError, attack_losses, generator_for
from lightning_grad.callbacks.adversarial._places import Place, find_place
from lightning_grad.callbacks.adversarial._step_loss import StepLoss, find_step, run_for_loss
from lightning_grad.core.dispatch import overrides
from lightning_grad.functional.adversarial.attacks import IndependentLossError
from lightning_grad.functional.plain_tensors import clone_of
from lightning_grad.utilities.batch_copies import copy_of
from lightning_grad.utilities.batches import map_tensors

Step = Callable[[Any], Any]


class WorstInputs:
    """Attacks batches, and remembers of each loader where its batches are attacked, and which step shows the loss.

    Args:
        attack: The attack.
        restarts: How often each batch is attacked; of each sample the input with the highest loss counts.
        input_key: Where the input is.
        loss: Which of the losses that a step computes is raised.
        seed: Seed of the random starts.
        needed_by: Who asks, for errors.
    """

    def __init__(
        self, attack: Attack, restarts: int, input_key: str | int | None, loss: int | None, seed: int, needed_by: str
    ) -> None:
        self._attack = attack
        self._restarts = restarts
        self._input_key = input_key
        self._loss = loss
        self._seed = seed
        self._needed_by = needed_by
        self._places: dict[Any, tuple[Place, str]] = {}

    @property
    def names(self) -> list[str]:
        """What was attacked so far."""
        return list(dict.fromkeys(name for place, _ in self._places.values() for name in place.names))

    def run(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: Step, batch: Any, batch_idx: int, loader: Any
    ) -> tuple[Place, Tensor]:
        """Attack a batch; inside of ``quiet``, with gradients.

        Args:
            trainer: The trainer.
            pl_module: Its module.
            step: Runs the evaluation step on a batch.
            batch: The batch.
            batch_idx: Its number.
            loader: Which loader it is from.

        Returns:
            tuple: Where its input is, and the attacked input.
        """
        batch = map_tensors(batch, lambda tensor: clone_of(tensor) if tensor.is_inference() else tensor)
        torch.clear_autocast_cache()  # older versions of torch would take what they have cast in inference mode
        steps = self._steps(trainer, pl_module, step, batch_idx)
        if loader not in self._places:
            self._places[loader] = self._place_of(pl_module, batch, steps)
        place, name = self._places[loader]
        failed: Exception | None = None
        # A step may fail on an input that has a gradient, for one batch only: where it draws a picture, say.
        for run in (steps[name], *(other for own, other in steps.items() if own != name)):
            try:
                return place, self._worst(trainer, place, batch, run, f"{loader}/{batch_idx}/{trainer.global_rank}")
            except Exception as error:
                failed = failed or error
        assert failed is not None
        failed.add_note(
            f"{self._needed_by} ran {name} on an input that has a gradient, to attack it. If that fails because a tensor was "
            "made in inference mode, use Trainer(inference_mode=False)."
        )
        raise failed

    def _steps(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: Step, batch_idx: int) -> dict[str, Step]:
        """Return the steps whose loss may be raised, in the order in which they are asked."""

        def train(shown: Any) -> Any:
            arguments = trainer.fit_loop.epoch_loop._build_kwargs(OrderedDict(), shown, batch_idx)
            return pl_module.training_step(*arguments.values())

        own = {"test_step" if trainer.testing else "validation_step": step}
        trains = pl_module.automatic_optimization and overrides(pl_module, "training_step")
        return {**own, "training_step": train} if trains else own

    def _place_of(self, pl_module: pl.LightningModule, batch: Any, steps: Mapping[str, Step]) -> tuple[Place, str]:
        place = find_place(pl_module, batch, self._input_key, self._needed_by)
        clean = place.inputs(batch, next(iter(steps.values())))
        self._attack.refuse_inputs(clean, self._needed_by)
        with place.shown(copy_of(batch), clean.clone().requires_grad_()) as shown:
            return place, find_step(steps, shown, len(clean), self._loss, self._restarts > 1, self._needed_by)

    def _worst(self, trainer: pl.Trainer, place: Place, batch: Any, step: Step, purpose: str) -> Tensor:
        clean = place.inputs(batch, step)

        def run(shown: Any) -> StepLoss:
            return run_for_loss(step, shown, len(clean), self._loss)

        loss_of = attack_losses(trainer, place, batch, lambda shown: run(shown).total)
        worst, highest = clean, torch.full((len(clean),), -torch.inf, device=clean.device)
        for restart in range(self._restarts):
            generator = generator_for(clean.device, self._seed, f"{purpose}/{restart}")
            inputs = self._raised(loss_of, clean, generator, place.support(batch))
            if self._restarts == 1:
                return inputs
            with place.shown(copy_of(batch), inputs) as shown:
                each = run(shown).each
            assert each is not None
            is_worse = each.detach() > highest
            worst = torch.where(is_worse.view(-1, *[1] * (clean.dim() - 1)), inputs, worst)
            highest = torch.where(is_worse, each.detach().to(highest), highest)
        return worst

    def _raised(
        self,
        loss_of: Callable[[Tensor], Tensor],
        clean: Tensor,
        generator: torch.Generator,
        support: Tensor | None,
    ) -> Tensor:
        try:
            return self._attack(loss_of, clean, generator, support=support)
        except NoLossError:
            raise RuntimeError(
                f"{self._needed_by}: the step that showed a loss for the first batch of a loader shows none for a later one. "
                "Compute it for every batch."
            ) from None
        except IndependentLossError as error:
            raise RuntimeError(
                f"{self._needed_by}: {error} If another part of the batch is the input, name it by input_key; else compute "
                "the loss from it with gradients, without detach() and torch.no_grad()."
            ) from None
