"""One look of a probe: how it is taken in a quiet module, what it finds, and how that reaches ranks, loggers and files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_grad.core.probe_samples import ProbeLook, ProbeSamples
from lightning_grad.core.quiet import quiet
from lightning_grad.core.undo import UndoList
from lightning_grad.functional.plain_tensors import plain_tensor
from lightning_grad.utilities.reporting import log_figure, log_histograms, log_many, log_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Picture:
    """A picture of bytes, such as an input or a map of activations.

    Args:
        pixels: (H, W) for gray or (H, W, 3) for colors, from 0 to 255.
        caption: Text below it, in loggers that show one.

    Raises:
        ValueError: For another shape or another type of number.

    Example:
        >>> Picture(np.zeros((8, 8)))
        Traceback (most recent call last):
        ValueError: pixels must be bytes of shape (H, W) or (H, W, 3); got float64 of shape (8, 8). Scale them to 0 ... 255 \
and call astype('uint8').
    """

    pixels: NDArray[np.uint8]
    caption: str = ""

    def __post_init__(self) -> None:
        pixels = self.pixels
        if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)):
            raise ValueError(
                f"pixels must be bytes of shape (H, W) or (H, W, 3); got {pixels.dtype} of shape {pixels.shape}. Scale them "
                "to 0 ... 255 and call astype('uint8')."
            )


@dataclass(frozen=True)
class Reading:
    """What one look has found.

    Args:
        scalars: Numbers by name. They are logged by every logger, kept in the record and drawn over the run.
        arrays: Tensors or arrays by name. They are written to one ``.npz`` file a look, and shown as histograms.
        pictures: Pictures or matplotlib figures by name. They are written as PNG files and shown as images.

    Example:
        >>> Reading({"norm": 1.0}).scalars
        {'norm': 1.0}
    """

    scalars: Mapping[str, float | Tensor] = field(default_factory=dict)
    arrays: Mapping[str, Tensor | NDArray[Any]] = field(default_factory=dict)
    pictures: Mapping[str, Picture | Figure] = field(default_factory=dict)


def numbers_of(reading: Any, display_name: str) -> dict[str, float]:
    """Return the scalars of a reading as numbers.

    Raises:
        TypeError: If it is no reading, or what it holds is of another kind.
    """
    if not isinstance(reading, Reading):
        raise TypeError(
            f"{display_name}.probe must return a Reading; got {type(reading).__name__}. Return Reading(scalars={{...}})."
        )
    for name, array in reading.arrays.items():
        if not isinstance(array, (Tensor, np.ndarray)):
            raise TypeError(
                f"{display_name}: the array {name!r} must be a tensor or an array; got {type(array).__name__}."
            )
    for name, picture in reading.pictures.items():
        if not isinstance(picture, Picture) and not hasattr(picture, "savefig"):
            raise TypeError(
                f"{display_name}: the picture {name!r} must be a Picture or a matplotlib Figure; got {type(picture).__name__}."
            )
    for name in ("epoch", "step"):
        if name in reading.scalars:
            raise TypeError(
                f"{display_name}: the record has a column {name!r} of its own. Give the scalar another name."
            )
    return {name: _number(name, value, display_name) for name, value in reading.scalars.items()}


def _number(name: str, value: Any, display_name: str) -> float:
    size = value.numel() if isinstance(value, Tensor) else np.size(value)
    if size != 1:
        raise TypeError(
            f"{display_name}: the scalar {name!r} must be one number; got {size} of them. Reduce it, or return it in arrays."
        )
    return float(plain_tensor(value).detach()) if isinstance(value, Tensor) else float(value)


def send_reading(
    trainer: pl.Trainer,
    numbers: Mapping[str, float],
    reading: Reading | None,
    key: Callable[[str], str],
    stem: Path | None,
) -> None:
    """Log the numbers on every rank; on the rank that has the reading also its arrays and pictures, as media and files.

    Args:
        trainer: The trainer, at the step of the look.
        numbers: The scalars.
        reading: The whole reading, where this rank has it.
        key: Makes a log key.
        stem: How the names of its files begin; ``None`` without a folder for logs.
    """
    log_many(trainer, {key(name): number for name, number in numbers.items()})
    if reading is None or not trainer.is_global_zero:
        return
    if reading.arrays:
        arrays = {name: _as_array(array) for name, array in reading.arrays.items()}
        log_histograms(trainer, {key(name): torch.as_tensor(array) for name, array in arrays.items()})
        if stem is not None:
            stem.parent.mkdir(parents=True, exist_ok=True)
            np.savez(stem.with_name(f"{stem.name}.npz"), **arrays)  # type: ignore[arg-type]
    if stem is not None:
        for name, picture in reading.pictures.items():
            path = stem.with_name(f"{stem.name}_{name.replace('/', '_')}.png")
            if isinstance(picture, Picture):
                log_picture(trainer, key(name), picture.pixels, path, picture.caption)
            else:
                log_figure(trainer, key(name), picture, path)


def _as_array(array: Tensor | NDArray[Any]) -> NDArray[Any]:
    if not isinstance(array, Tensor):
        return array
    array = plain_tensor(array).detach().cpu()
    return (array.float() if array.dtype == torch.bfloat16 else array).numpy()  # numpy has no bfloat16


@dataclass
class Outcome:
    """How a look ended.

    Args:
        numbers: The scalars, the same on all ranks; ``None`` after an error.
        reading: All that was found, on a rank that has looked.
        error: What this rank raised.
        fault: What any rank raised, in words; empty if none did.
        is_fatal: Whether the module is not what it was before.
    """

    numbers: Mapping[str, float] | None = None
    reading: Reading | None = None
    error: Exception | None = None
    fault: str = ""
    is_fatal: bool = False

    def shared(self, trainer: pl.Trainer, on_all: bool) -> Outcome:
        """Return the outcome with what all ranks must agree about; to be called on every rank.

        Args:
            trainer: The trainer.
            on_all: Whether all ranks have looked, or only the first.
        """
        numbers, fault, is_fatal = trainer.strategy.broadcast((self.numbers, self.fault, self.is_fatal))
        if on_all and trainer.strategy.reduce_boolean_decision(bool(self.fault), all=False):
            fault = self.fault or fault or "That rank shows the error."
        return Outcome(None if fault else numbers, self.reading, self.error, fault, is_fatal or self.is_fatal)


def take_look(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    samples: ProbeSamples,
    probe: Callable[[ProbeLook], Reading],
    due: Mapping[str, int],
) -> Outcome:
    """Run a probe once and leave no trace of it."""
    outcome, undo = Outcome(), UndoList()
    try:
        # Outside of inference mode, in which a user may have Lightning validate: nothing made there has a gradient.
        with torch.inference_mode(False), torch.no_grad(), _prepared(trainer, pl_module, samples):
            try:
                with samples.kept():
                    look = samples.look(pl_module, due["epoch"], due["step"], undo)
                    outcome.reading = probe(look)
                    outcome.numbers = numbers_of(outcome.reading, samples.asked.display_name)
            except Exception as error:
                outcome.error = error
            finally:
                undo.run()
    except Exception as error:  # from what puts the module back
        outcome.error, outcome.is_fatal = error, True
    if outcome.error is not None:
        outcome.fault = f"{type(outcome.error).__name__}: {outcome.error}"
    return outcome


@contextmanager
def _prepared(trainer: pl.Trainer, pl_module: pl.LightningModule, samples: ProbeSamples) -> Iterator[None]:
    """Make the module quiet, in the precision of the run, and in the stage that the samples belong to."""
    stage = trainer.state.stage
    with quiet(trainer, pl_module, display_name=samples.asked.display_name), trainer.precision_plugin.forward_context():
        if samples.split == "train":  # hooks of the module may ask which stage a batch is of
            trainer.training = True
        else:
            trainer.validating = True
        try:
            yield
        finally:
            trainer.state.stage = stage


@contextmanager
def averaged_weights(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[None]:
    """Put the weights into the module that a validation sees with Lightning's weight averaging."""
    found: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    callbacks = [c for c in found if hasattr(c, "_swap_models") and getattr(c, "_average_model", None) is not None]
    for callback in callbacks:
        callback._swap_models(pl_module)
    try:
        yield
    finally:
        for callback in reversed(callbacks):
            callback._swap_models(pl_module)
