"""What one look of a probe has found, and how it reaches loggers and files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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


def numbers_of(reading: Any, label: str) -> dict[str, float]:
    """Return the scalars of a reading as numbers.

    Raises:
        TypeError: If it is no reading, or what it holds is of another kind.
    """
    if not isinstance(reading, Reading):
        raise TypeError(
            f"{label}.probe must return a Reading; got {type(reading).__name__}. Return Reading(scalars={{...}})."
        )
    for name, array in reading.arrays.items():
        if not isinstance(array, (Tensor, np.ndarray)):
            raise TypeError(f"{label}: the array {name!r} must be a tensor or an array; got {type(array).__name__}.")
    for name, picture in reading.pictures.items():
        if not isinstance(picture, Picture) and not hasattr(picture, "savefig"):
            raise TypeError(
                f"{label}: the picture {name!r} must be a Picture or a matplotlib Figure; got {type(picture).__name__}."
            )
    for name in ("epoch", "step"):
        if name in reading.scalars:
            raise TypeError(f"{label}: the record has a column {name!r} of its own. Give the scalar another name.")
    return {name: _number(name, value, label) for name, value in reading.scalars.items()}


def _number(name: str, value: Any, label: str) -> float:
    size = value.numel() if isinstance(value, Tensor) else np.size(value)
    if size != 1:
        raise TypeError(
            f"{label}: the scalar {name!r} must be one number; got {size} of them. Reduce it, or return it in arrays."
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
