"""How inputs are attacked: the settings that training and evaluation share, their checks, and the run of an attack."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_grad.callbacks.adversarial._places import Place, Run
from lightning_grad.core.losses.sample_losses import loss_of_output
from lightning_grad.functional.adversarial.attacks import IndependentLossError, Norm, fgsm, pgd
from lightning_grad.functional.shuffling import hashed_seed
from lightning_grad.utilities.batch_copies import copy_of
from lightning_grad.utilities.checks import check_above, check_at_least, check_count
from lightning_grad.utilities.precision import grad_scaler
from lightning_grad.utilities.reporting import counted

_LARGEST = 1e30  # what is computed from it still fits into float32
_ROUNDING = 1e-3  # of the bounds' distance: half precision, and means that were rounded

Loss = Callable[[Tensor], Tensor]  # of the inputs


@dataclass
class Attack:
    """An attack with all its settings; a callable, so that it can be handed on.

    Args:
        epsilon: Radius of the ball.
        steps: Steps of the ascent.
        step_size: Its step size; ``None`` for that of :func:`fgsm` with one step, of :func:`pgd` with more.
        norm: Norm of the ball.
        random_start: Whether it begins at a random point.
        bounds: Least and largest value of an input.
        mean: Mean by which inputs were normalised.
        std: Standard deviation by which they were divided.

    Raises:
        ValueError: If one of them is out of its range.
    """

    epsilon: float
    steps: int
    step_size: float | None
    norm: Norm
    random_start: bool
    bounds: Any  # a sequence, or None
    mean: Any  # a number or a sequence, or None
    std: Any

    def __post_init__(self) -> None:
        self.bounds, self.mean, self.std = _space_of(self.bounds, self.mean, self.std)
        check_at_least(self.epsilon, 0.0, "epsilon")
        _check_magnitude(self.epsilon, "epsilon", "Choose the largest change that must not matter")
        check_count(self.steps, 1, "steps")
        if self.step_size is not None:
            check_above(self.step_size, 0.0, "step_size")
            _check_magnitude(self.step_size, "step_size", "Leave it out for the usual one")

    @property
    def described(self) -> str:
        """What a line about it says in brackets."""
        return f"{counted(self.steps, 'step')}, epsilon {self.epsilon:g} in {self.norm}"

    def __call__(
        self, loss_of: Loss, inputs: Tensor, generator: torch.Generator, support: Tensor | None, share: float = 1.0
    ) -> Tensor:
        """Attack inputs, with this share of epsilon and step size, where the support is 1."""
        settings = {**vars(self), "epsilon": share * self.epsilon, "generator": generator, "support": support}
        settings["step_size"] = None if self.step_size is None else share * self.step_size
        attack: Callable[..., Tensor] = pgd
        if self.steps == 1:
            attack = fgsm
            del settings["steps"]
        # What autocast has cast without a graph must not serve here, nor what is cast here afterwards.
        torch.clear_autocast_cache()
        attacked = attack(loss_of, inputs, **settings)
        torch.clear_autocast_cache()
        return attacked

    def refuse_inputs(self, inputs: Tensor, needed_by: str) -> None:
        """Raise if inputs are not what the settings say. It waits for the device, so ask once.

        Raises:
            ValueError: If they lie outside the bounds, or mean and std are not one for each channel.
        """
        channels = inputs.shape[1] if inputs.dim() > 1 else 1
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) not in (1, channels):
                raise ValueError(
                    f"{needed_by} needs {name} for each of {channels} channels (dimension 1 of {tuple(inputs.shape)}), or one "
                    f"number; got {len(values)}. Give {name} as a list of {channels} numbers, or as one."
                )
        if self.bounds is None:
            return
        (low, high), (least, most) = self.bounds, self._range_in_pixels(inputs)
        slack = _ROUNDING * (high - low)
        if least < low - slack or most > high + slack:
            raise ValueError(
                f"{needed_by}: the inputs reach from {least:.3g} to {most:.3g}, outside bounds=({low:g}, {high:g}). If they "
                "are normalised, give mean and std, and epsilon and bounds in pixels; else give the bounds they have."
            )

    def _range_in_pixels(self, inputs: Tensor) -> tuple[float, float]:
        shape = (1, -1, *[1] * (inputs.dim() - 2)) if inputs.dim() > 1 else (-1,)
        for values, act in ((self.std, torch.mul), (self.mean, torch.add)):
            if values is not None:
                inputs = act(inputs, torch.tensor(values, device=inputs.device).view(shape))
        return float(inputs.min()), float(inputs.max())


def generator_for(device: torch.device, seed: int, purpose: str) -> torch.Generator:
    """Return a generator for one attack: the same numbers for the same purpose, also in a run that resumes."""
    return torch.Generator(device).manual_seed(hashed_seed(seed, purpose))


def attack_losses(
    trainer: pl.Trainer, place: Place, batch: Any, run: Run, note: Callable[[Tensor], None] | None = None
) -> Loss:
    """Return the loss that an attack raises, as a function of the inputs.

    Under a GradScaler it is multiplied by the scale: small gradients with respect to inputs would vanish in half precision.

    Args:
        trainer: The trainer.
        place: Where the inputs go.
        batch: The batch whose inputs are replaced.
        run: Runs the step on a batch.
        note: Called with every loss, before it is scaled.
    """
    scaler = grad_scaler(trainer)

    def loss_of(inputs: Tensor) -> Tensor:
        with place.shown(copy_of(batch), inputs) as shown:
            loss = loss_of_output(run(shown))
        if loss is None:
            raise NoLossError("The step returns no loss.")
        if note is not None:
            note(loss)
        return loss if scaler is None else scaler.scale(loss)

    return loss_of


class NoLossError(RuntimeError):
    """A step has returned no loss."""


def refused(error: IndependentLossError, needed_by: str) -> RuntimeError:
    """Return what to raise for a loss that no attack can raise."""
    return RuntimeError(
        f"{needed_by}: {error} If another part of the batch is the input, name it by input_key; else compute "
        "the loss from it with gradients, without detach() and torch.no_grad()."
    )


def _space_of(bounds: Any, mean: Any, std: Any) -> tuple[Any, Any, Any]:
    """Check the settings of the space in which inputs lie, and return them as tuples."""
    if (mean is None) != (std is None):
        raise ValueError(f"mean and std belong together; got mean={mean} and std={std}.")
    means, stds = _numbers(mean, "mean"), _numbers(std, "std")
    for value in stds or ():
        check_above(value, 0.0, "std")
    if means and stds and len(means) != len(stds) and 1 not in (len(means), len(stds)):
        raise ValueError(
            f"mean and std must have a number for each channel, or one for all; got {len(means)} and {len(stds)}."
        )
    if bounds is None:
        return None, means, stds
    pair = tuple(float(bound) for bound in bounds)
    if len(pair) != 2 or not pair[0] < pair[1]:
        raise ValueError(
            f"bounds must be the least and the largest value of an input, such as [0, 1]; got {list(pair)}."
        )
    for bound in pair:
        _check_magnitude(bound, "bounds", "Where inputs have a limit on one side only, give a number that none reaches")
    return pair, means, stds


def _numbers(values: Sequence[float] | float | None, parameter: str) -> tuple[float, ...] | None:
    if values is None:
        return None
    numbers = (float(values),) if isinstance(values, (int, float)) else tuple(float(value) for value in values)
    if not numbers:
        raise ValueError(f"{parameter} must be a number, or one for each channel; got {list(numbers)}.")
    for number in numbers:
        _check_magnitude(number, parameter, "Give the one by which the inputs were normalised")
    return numbers


def _check_magnitude(value: float, parameter: str, hint: str) -> None:
    if not abs(value) <= _LARGEST:
        raise ValueError(f"{parameter} must be finite, and at most {_LARGEST:g}; got {value}. {hint}.")
