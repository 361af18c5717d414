"""One look of a probe: taking it in a quiet module, and sending its reading to ranks, loggers and files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
from lightning_grad.utilities.reporting import (
    log_figure,
    log_histograms,
    log_many,
    log_picture,
    log_table,
    tolerated,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Picture:
    """An 8-bit picture, such as an input or an activation map.

    Args:
        pixels: uint8 array of shape (H, W) for gray or (H, W, 3) for colors.
        caption: Caption, for loggers that show one.

    Raises:
        ValueError: For another shape or type.

    Example:
        >>> Picture(np.zeros((8, 8)))
        Traceback (most recent call last):
        ValueError: pixels must be uint8 of shape (H, W) or (H, W, 3); got float64 of shape (8, 8). Scale them to 0 ... 255 \
and call astype('uint8').
    """

    pixels: NDArray[np.uint8]
    caption: str = ""

    def __post_init__(self) -> None:
        pixels = self.pixels
        if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)):
            raise ValueError(
                f"pixels must be uint8 of shape (H, W) or (H, W, 3); got {pixels.dtype} of shape {pixels.shape}. "
                "Scale them to 0 ... 255 and call astype('uint8')."
            )


@dataclass(frozen=True)
class Table:
    """A table of one look, such as one row for each sample.

    Args:
        rows: Rows with the same keys: numbers or strings.
        pictures: uint8 array of shape (H, W) or (H, W, 3) for each row; W&B shows them in the table.

    Example:
        >>> Table([{"index": 0, "loss": 0.5}]).rows
        [{'index': 0, 'loss': 0.5}]
    """

    rows: Sequence[Mapping[str, Any]]
    pictures: Sequence[NDArray[np.uint8]] = ()


@dataclass(frozen=True)
class Reading:
    """The result of one look.

    Args:
        scalars: Numbers by name: logged by every logger, stored in the record and drawn over the
            run.
        arrays: Tensors or arrays by name: written to one ``.npz`` file per look, and logged as
            histograms.
        pictures: Pictures or matplotlib figures by name: written as PNG files, and logged as
            images. A function that returns a figure is called only if the figure can be shown.
        tables: Tables by name: written as CSV files, and logged as tables.
        kept: Small tensors that the figure of the whole run needs. ``kept_looks`` of the probe
            holds those of some looks, spread over the run; they are part of checkpoints.

    Example:
        >>> Reading({"norm": 1.0}).scalars
        {'norm': 1.0}
    """

    scalars: Mapping[str, float | Tensor] = field(default_factory=dict)
    arrays: Mapping[str, Tensor | NDArray[Any]] = field(default_factory=dict)
    pictures: Mapping[str, Picture | Figure | Callable[[], Figure]] = field(default_factory=dict)
    tables: Mapping[str, Table] = field(default_factory=dict)
    kept: Mapping[str, Tensor] = field(default_factory=dict)


def numbers_of(reading: Any, display_name: str) -> dict[str, float]:
    """Return the scalars of a reading as numbers.

    Raises:
        TypeError: If it is not a Reading, or one of its values has a wrong type.
    """
    if not isinstance(reading, Reading):
        raise TypeError(
            f"{display_name}.probe must return a Reading; got {type(reading).__name__}. Return "
            f"Reading(scalars={{...}})."
        )
    for name, array in reading.arrays.items():
        if not isinstance(array, (Tensor, np.ndarray)):
            raise TypeError(
                f"{display_name}: the array {name!r} must be a tensor or an array; got {type(array).__name__}."
            )
    for name, picture in reading.pictures.items():
        if not isinstance(picture, Picture) and not hasattr(picture, "savefig") and not callable(picture):
            raise TypeError(
                f"{display_name}: the picture {name!r} must be a Picture or a matplotlib Figure; got "
                f"{type(picture).__name__}."
            )
    for name, table in reading.tables.items():
        if not isinstance(table, Table):
            raise TypeError(f"{display_name}: the table {name!r} must be a Table; got {type(table).__name__}.")
    for name in ("epoch", "step"):
        if name in reading.scalars or name in reading.kept:
            raise TypeError(
                f"{display_name}: no scalar can be named {name!r}, because the record has a column of that name. "
                "Rename it."
            )
    return {name: _number(name, value, display_name) for name, value in reading.scalars.items()}


def _number(name: str, value: Any, display_name: str) -> float:
    size = value.numel() if isinstance(value, Tensor) else np.size(value)
    if size != 1:
        raise TypeError(
            f"{display_name}: the scalar {name!r} must be one number; got {size} numbers. Reduce it, or return it in "
            "arrays."
        )
    return float(plain_tensor(value).detach()) if isinstance(value, Tensor) else float(value)


def send_reading(
    trainer: pl.Trainer,
    numbers: Mapping[str, float],
    reading: Reading | None,
    key: Callable[[str], str],
    stem: Path | None,
    display_name: str,
) -> None:
    """Log the numbers on every rank, and on rank zero the rest, as media and files.

    A figure, table or file that fails becomes a warning.

    Args:
        trainer: The trainer, at the step of the look.
        numbers: The scalars.
        reading: The whole reading; ``None`` on a rank that did not run the probe.
        key: Creates a log key from a name.
        stem: Path prefix of the files; ``None`` without a log folder.
        display_name: Name of the technique, for warnings.
    """
    log_many(trainer, {key(name): number for name, number in numbers.items()})
    if reading is not None and trainer.is_global_zero:
        with tolerated(display_name, "the figures and tables of this look"):
            _send_media(trainer, reading, key, stem)


def _send_media(trainer: pl.Trainer, reading: Reading, key: Callable[[str], str], stem: Path | None) -> None:
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
        for name, table in reading.tables.items():
            log_table(trainer, key(name), table.rows, stem.with_name(f"{stem.name}_{name}.csv"), table.pictures)


def _as_array(array: Tensor | NDArray[Any]) -> NDArray[Any]:
    if not isinstance(array, Tensor):
        return array
    array = plain_tensor(array).detach().cpu()
    return (array.float() if array.dtype == torch.bfloat16 else array).numpy()  # numpy has no bfloat16


@dataclass
class Outcome:
    """The outcome of a look.

    Args:
        numbers: The scalars, the same on all ranks; ``None`` after an error.
        reading: The whole reading, on a rank that took the look.
        error: Exception that this rank raised.
        fault: Text of an exception that any rank raised; empty if none did.
        is_fatal: Whether the module could not be restored.
    """

    numbers: Mapping[str, float] | None = None
    reading: Reading | None = None
    error: Exception | None = None
    fault: str = ""
    is_fatal: bool = False

    def shared(self, trainer: pl.Trainer, on_all: bool) -> Outcome:
        """Return the outcome that all ranks agree on. Call it on every rank.

        Args:
            trainer: The trainer.
            on_all: Whether all ranks took the look, or only rank zero.
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
    """Run a probe once without leaving a trace."""
    outcome, undo = Outcome(), UndoList()
    try:
        # Lightning may validate in inference mode, whose tensors can have no gradient; the probe
        # may need gradients.
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
    except Exception as error:  # raised while the module was restored
        outcome.error, outcome.is_fatal = error, True
    if outcome.error is not None:
        outcome.fault = f"{type(outcome.error).__name__}: {outcome.error}"
    return outcome


@contextmanager
def _prepared(trainer: pl.Trainer, pl_module: pl.LightningModule, samples: ProbeSamples) -> Iterator[None]:
    """Make the module quiet, and set the run's precision and the stage of the samples."""
    stage = trainer.state.stage
    with quiet(trainer, pl_module, display_name=samples.asked.display_name), trainer.precision_plugin.forward_context():
        if samples.split == "train":  # hooks of the module may check the trainer's stage
            trainer.training = True
        else:
            trainer.validating = True
        try:
            yield
        finally:
            trainer.state.stage = stage


@contextmanager
def averaged_weights(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[None]:
    """Swap in the weights that validation uses under Lightning's weight averaging."""
    found: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    callbacks = [c for c in found if hasattr(c, "_swap_models") and getattr(c, "_average_model", None) is not None]
    for callback in callbacks:
        callback._swap_models(pl_module)
    try:
        yield
    finally:
        for callback in reversed(callbacks):
            callback._swap_models(pl_module)
