"""The attack of both callbacks: its settings, their checks, and its run."""

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

_LARGEST = 1e30  # results computed from it still fit into float32
_ROUNDING = 1e-3  # tolerance as a share of the range of the bounds, for half precision and rounded means

Loss = Callable[[Tensor], Tensor]  # of the inputs


@dataclass
class Attack:
    """An attack with all its settings, as a callable.

    Args:
        epsilon: Radius of the ball.
        steps: Number of steps.
        step_size: Step size; ``None`` for the default of :func:`fgsm` (one step) or :func:`pgd` (several).
        norm: Norm of the ball.
        random_start: Whether to start at a random point.
        bounds: Minimum and maximum of an input.
        mean: Mean with which inputs were normalized.
        std: Standard deviation by which they were divided.

    Raises:
        ValueError: If a setting is out of its range.
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
        _check_magnitude(self.epsilon, "epsilon", "Set it to the largest change of an input that should not matter")
        check_count(self.steps, 1, "steps")
        if self.step_size is not None:
            check_above(self.step_size, 0.0, "step_size")
            _check_magnitude(self.step_size, "step_size", "Use None for the default")

    @property
    def described(self) -> str:
        """Short description for messages."""
        return f"{counted(self.steps, 'step')}, epsilon {self.epsilon:g} in {self.norm}"

    def __call__(
        self, loss_of: Loss, inputs: Tensor, generator: torch.Generator, support: Tensor | None, share: float = 1.0
    ) -> Tensor:
        """Return attacked inputs; ``share`` scales epsilon and step size, ``support`` masks the change."""
        settings = {**vars(self), "epsilon": share * self.epsilon, "generator": generator, "support": support}
        settings["step_size"] = None if self.step_size is None else share * self.step_size
        attack: Callable[..., Tensor] = pgd
        if self.steps == 1:
            attack = fgsm
            del settings["steps"]
        # Autocast caches the weights that it casts. The attack needs a graph, so it must not use those cached without
        # one, and later code must not use those cached in the attack.
        torch.clear_autocast_cache()
        attacked = attack(loss_of, inputs, **settings)
        torch.clear_autocast_cache()
        return attacked

    def refuse_inputs(self, inputs: Tensor, needed_by: str) -> None:
        """Raise if inputs do not match the settings. This synchronizes with the device, so call it only once.

        Raises:
            ValueError: If inputs lie outside the bounds, or the lengths of mean and std do not match the channels.
        """
        channels = inputs.shape[1] if inputs.dim() > 1 else 1
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) not in (1, channels):
                raise ValueError(
                    f"{needed_by}: {name} must have one number for each of {channels} channels (dimension 1 of "
                    f"{tuple(inputs.shape)}), or one for all; got {len(values)}. Set {name} to a list of {channels} "
                    "numbers, or to one number."
                )
        if self.bounds is None:
            return
        (low, high), (least, most) = self.bounds, self._range_in_pixels(inputs)
        slack = _ROUNDING * (high - low)
        if least < low - slack or most > high + slack:
            raise ValueError(
                f"{needed_by}: the inputs range from {least:.3g} to {most:.3g}, outside bounds=({low:g}, {high:g}). "
                "If they are normalized, set mean and std, and set epsilon and bounds in pixels. Otherwise set "
                "bounds to their range."
            )

    def _range_in_pixels(self, inputs: Tensor) -> tuple[float, float]:
        shape = (1, -1, *[1] * (inputs.dim() - 2)) if inputs.dim() > 1 else (-1,)
        for values, act in ((self.std, torch.mul), (self.mean, torch.add)):
            if values is not None:
                inputs = act(inputs, torch.tensor(values, device=inputs.device).view(shape))
        return float(inputs.min()), float(inputs.max())


def generator_for(device: torch.device, seed: int, purpose: str) -> torch.Generator:
    """Return a generator for one attack: the same numbers for the same purpose, also after a resume."""
    return torch.Generator(device).manual_seed(hashed_seed(seed, purpose))


def attack_losses(
    trainer: pl.Trainer, place: Place, batch: Any, run: Run, note: Callable[[Tensor], None] | None = None
) -> Loss:
    """Return the loss that an attack maximizes, as a function of the inputs.

    With a GradScaler the loss is multiplied by the scale, because small gradients of inputs would underflow in half
    precision.

    Args:
        trainer: The trainer.
        place: Location of the inputs.
        batch: The batch whose inputs are replaced.
        run: Function that runs the step on a batch.
        note: Function called with every loss before scaling.
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
    """Return the error for a loss that does not depend on the inputs."""
    return RuntimeError(
        f"{needed_by}: {error} If another part of the batch is the input, set input_key to it. Otherwise compute "
        "the loss from the input with gradients, without detach() and torch.no_grad()."
    )


def _space_of(bounds: Any, mean: Any, std: Any) -> tuple[Any, Any, Any]:
    """Check bounds, mean and std, and return them as tuples."""
    if (mean is None) != (std is None):
        raise ValueError(f"mean and std must be set together; got mean={mean} and std={std}.")
    means, stds = _numbers(mean, "mean"), _numbers(std, "std")
    for value in stds or ():
        check_above(value, 0.0, "std")
    if means and stds and len(means) != len(stds) and 1 not in (len(means), len(stds)):
        raise ValueError(
            f"mean and std must have one number per channel, or one for all; got {len(means)} and {len(stds)}."
        )
    if bounds is None:
        return None, means, stds
    pair = tuple(float(bound) for bound in bounds)
    if len(pair) != 2 or not pair[0] < pair[1]:
        raise ValueError(f"bounds must be the minimum and the maximum of an input, such as [0, 1]; got {list(pair)}.")
    for bound in pair:
        _check_magnitude(bound, "bounds", "If inputs have only one limit, set the other bound to a number out of reach")
    return pair, means, stds


def _numbers(values: Sequence[float] | float | None, parameter: str) -> tuple[float, ...] | None:
    if values is None:
        return None
    numbers = (float(values),) if isinstance(values, (int, float)) else tuple(float(value) for value in values)
    if not numbers:
        raise ValueError(f"{parameter} must be a number, or one per channel; got {list(numbers)}.")
    for number in numbers:
        _check_magnitude(number, parameter, "Use the value with which the inputs were normalized")
    return numbers


def _check_magnitude(value: float, parameter: str, hint: str) -> None:
    if not abs(value) <= _LARGEST:
        raise ValueError(f"{parameter} must be finite and at most {_LARGEST:g}; got {value}. {hint}.")
