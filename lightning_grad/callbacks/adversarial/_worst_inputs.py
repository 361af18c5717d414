"""Find the inputs with the highest loss near the inputs of an evaluation batch.

An evaluation step need not return a loss. If it does not, the loss that it computes is used.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_grad.callbacks.adversarial._attack import Attack, NoLossError, attack_losses, generator_for, refused
from lightning_grad.callbacks.adversarial._places import Place, find_place
from lightning_grad.core.dispatch import overrides
from lightning_grad.core.losses.sample_losses import loss_of_output
from lightning_grad.functional import LossCapture
from lightning_grad.functional.adversarial.attacks import IndependentLossError
from lightning_grad.functional.plain_tensors import clone_of, plain_tensor
from lightning_grad.utilities.batch_copies import copy_of
from lightning_grad.utilities.batches import map_tensors
from lightning_grad.utilities.reporting import first_sentence

Step = Callable[[Any], Any]


@dataclass
class WorstInputs:
    """Attacks batches, and stores per loader where its input is and which step shows its loss.

    Args:
        attack: The attack.
        restarts: Number of attacks per batch; for each sample the input with the highest loss is used.
        input_key: Key of the input in the batch.
        loss_index: Index of the loss call to maximize.
        seed: Seed of the random starts.
        needed_by: Name of the callback in errors.
    """

    attack: Attack
    restarts: int
    input_key: str | int | None
    loss_index: int | None
    seed: int
    needed_by: str
    _places: dict[Any, tuple[Place, str]] = field(default_factory=dict, init=False)

    @property
    def names(self) -> list[str]:
        """Names of the inputs attacked so far."""
        return list(dict.fromkeys(name for place, _ in self._places.values() for name in place.names))

    def run(self, trainer: pl.Trainer, step: Step, batch: Any, batch_idx: int, loader: Any) -> tuple[Place, Tensor]:
        """Attack a batch. Call it inside ``quiet`` and with gradients enabled.

        Args:
            trainer: The trainer.
            step: Function that runs the evaluation step on a batch.
            batch: The batch.
            batch_idx: Its index.
            loader: Index of its loader.

        Returns:
            tuple: The place of its input, and the attacked input.
        """
        batch = map_tensors(batch, lambda tensor: clone_of(tensor) if tensor.is_inference() else tensor)
        torch.clear_autocast_cache()  # older versions of torch would reuse weights cast in inference mode
        steps = _steps(trainer, step, batch_idx)
        purpose = f"{loader}/{batch_idx}/{trainer.global_rank}"
        if loader not in self._places:
            place = self._place_of(trainer.lightning_module, batch, steps)
            name, inputs = self._first(trainer, place, batch, steps, purpose)
            self._places[loader] = place, name
            if inputs is not None:
                return place, inputs
        place, name = self._places[loader]
        try:
            return place, self._worst(trainer, place, batch, steps[name], purpose)
        except Exception as error:
            # A step may fail for some batches on an input with a gradient, for example where it draws a picture.
            for other in (other for own, other in steps.items() if own != name):
                with suppress(Exception):
                    return place, self._worst(trainer, place, batch, other, purpose)
            error.add_note(
                f"{self.needed_by} ran {name} on an input that requires a gradient, to attack it. If this fails "
                "because a tensor was created in inference mode, use Trainer(inference_mode=False)."
            )
            raise

    def _place_of(self, pl_module: pl.LightningModule, batch: Any, steps: Mapping[str, Step]) -> Place:
        place = find_place(pl_module, batch, self.input_key, self.needed_by)
        self.attack.refuse_inputs(place.inputs(batch, next(iter(steps.values()))), self.needed_by)
        return place

    def _first(
        self, trainer: pl.Trainer, place: Place, batch: Any, steps: Mapping[str, Step], purpose: str
    ) -> tuple[str, Tensor | None]:
        """Attack with the first step at once. Only if this fails, look for a step that shows its loss.

        Returns:
            tuple: The name of the step, and the attacked inputs, or ``None`` if the first attack failed.
        """
        name, step = next(iter(steps.items()))
        with suppress(Exception):  # the search below names the reason
            return name, self._worst(trainer, place, batch, step, purpose)
        clean = place.inputs(batch, step)
        with place.shown(copy_of(batch), clean.clone().requires_grad_()) as shown:
            return self._find_step(steps, shown, len(clean)), None

    def _find_step(self, steps: Mapping[str, Step], batch: Any, samples: int) -> str:
        """Return the name of the first step that shows its loss, with several restarts the loss of each sample.

        Raises:
            RuntimeError: If no step does.
        """
        reasons, several = [], self.restarts > 1
        for name, step in steps.items():
            try:
                # A copy, because a step may write into its batch.
                total, each, reason = run_for_loss(step, copy_of(batch), samples, self.loss_index)
            except Exception as error:  # training_step may not support batches of a validation loader
                reasons.append(f"{name} fails on its batch ({type(error).__name__}: {error})")
                continue
            if (each if several else total) is not None:
                return name
            reasons.append(f"{name} shows none{f' ({reason})' if reason else ''}")
        kind = "the loss of each sample for several restarts" if several else "a loss to maximize"
        raise RuntimeError(
            f"{self.needed_by} needs {kind}, but {'; '.join(reasons)}. Compute it in {next(iter(steps))} with a loss "
            f"of torch.nn.functional{'' if several else ', or return it'}. If there are several losses, set "
            "loss_index=0 to use the first."
        )

    def _worst(self, trainer: pl.Trainer, place: Place, batch: Any, step: Step, purpose: str) -> Tensor:
        """Attack the batch ``restarts`` times and return, for each sample, the input with the highest loss."""
        clean = place.inputs(batch, step)

        def losses(shown: Any) -> tuple[Tensor | None, Tensor | None, str]:
            return run_for_loss(step, shown, len(clean), self.loss_index)

        loss_of = attack_losses(trainer, place, batch, lambda shown: losses(shown)[0])
        worst, highest = clean, torch.full((len(clean),), -torch.inf, device=clean.device)
        for restart in range(self.restarts):
            generator = generator_for(clean.device, self.seed, f"{purpose}/{restart}")
            try:
                inputs = self.attack(loss_of, clean, generator, place.support(batch))
            except NoLossError:
                raise self._without_loss() from None
            except IndependentLossError as error:
                raise refused(error, self.needed_by) from None
            if self.restarts == 1:
                return inputs
            with place.shown(copy_of(batch), inputs) as shown:
                each = losses(shown)[1]
            if each is None:
                raise self._without_loss()
            is_worse = each.detach() > highest
            worst = torch.where(is_worse.view(-1, *[1] * (clean.dim() - 1)), inputs, worst)
            highest = torch.where(is_worse, each.detach().to(highest), highest)
        return worst

    def _without_loss(self) -> RuntimeError:
        return RuntimeError(
            f"{self.needed_by}: the step showed a loss for the first batch of a loader, but none for a later one. "
            "Compute the loss for every batch."
        )


def _steps(trainer: pl.Trainer, step: Step, batch_idx: int) -> dict[str, Step]:
    """Return the steps whose loss an attack may use, in the order in which they are tried."""
    pl_module = trainer.lightning_module

    def train(shown: Any) -> Any:
        arguments = trainer.fit_loop.epoch_loop._build_kwargs(OrderedDict(), shown, batch_idx)
        return pl_module.training_step(*arguments.values())

    own = {"test_step" if trainer.testing else "validation_step": step}
    trains = pl_module.automatic_optimization and overrides(pl_module, "training_step")
    return {**own, "training_step": train} if trains else own


def run_for_loss(
    step: Step, batch: Any, samples: int, loss_index: int | None
) -> tuple[Tensor | None, Tensor | None, str]:
    """Run a step on a batch and return its loss, with its graph.

    Args:
        step: The step.
        batch: The batch.
        samples: Number of samples in it.
        loss_index: Index of the loss call to return.
            ``None`` for the loss that the step returns, or its only loss call.

    Returns:
        tuple: The scalar loss of the batch and the losses of its samples, (B,), each ``None`` if there is none.
            Third, why
        the losses of the samples cannot be read, if the step computes losses that may be meant.
    """
    with LossCapture(samples, keep_graph=True) as capture:
        returned = loss_of_output(step(batch))
    each, reason = _each(capture, loss_index)
    # A step may return logits, which are not a loss.
    returned = returned if returned is not None and returned.requires_grad and returned.numel() == 1 else None
    if (loss_index is not None or returned is None) and each is not None:
        return each.sum(), each, ""
    return returned if loss_index is None else None, each, reason


def _each(capture: LossCapture, loss_index: int | None) -> tuple[Tensor | None, str]:
    try:
        each = plain_tensor(capture.only(loss_index).losses).nan_to_num()
    except (RuntimeError, ValueError) as error:
        return None, first_sentence(error) if capture.calls or capture.unread else ""
    return (each, "") if each.requires_grad else (None, "its loss has no gradient")
