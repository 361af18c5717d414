"""Send results to all loggers of a Trainer, in the form that each of them supports.

Scalars of a step go through ``pl_module.log``. This module sends everything else: settings, final results, figures,
tables, histograms and files. All of them are also written to disk or as scalars, for CSV and TensorBoard users. All
functions may be called on every rank; only rank zero writes.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_MOST_TEXT_ROWS = 200  # rows of a table that TensorBoard shows as text
_LONGEST_NAME = 128  # characters of an artifact's name that W&B accepts
_MOST_ROWS = 10_000  # rows of a table that W&B shows; the CSV file has all rows


def is_installed(package: str) -> bool:
    """Return True if an optional package is installed, without importing it."""
    return find_spec(package) is not None


def stepped_batches(trainer: pl.Trainer) -> int:
    """Return the step that Lightning's loggers use as x axis; it does not depend on the number of optimizers."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


@contextmanager
def logged_at(trainer: pl.Trainer, step: int) -> Iterator[None]:
    """Log everything inside the block at the given step, like Lightning at the end of an epoch."""
    loop = trainer.fit_loop.epoch_loop
    now, loop._batches_that_stepped = loop._batches_that_stepped, step
    try:
        yield
    finally:
        loop._batches_that_stepped = now


def is_log_step(trainer: pl.Trainer, ahead: int = 0) -> bool:
    """Return True if scalars of the current step (or ``ahead`` steps later) are sent to the loggers."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return True
    return every > 0 and (stepped_batches(trainer) + 1 + ahead) % every == 0


def output_folder(trainer: pl.Trainer) -> Path | None:
    """Return the folder of this run's logs, or ``None`` if the Trainer has no logger."""
    for logger in trainer.loggers:
        folder = getattr(logger, "log_dir", None)
        if folder is None and logger.save_dir is not None:
            folder = Path(logger.save_dir, *(str(part) for part in (logger.name, logger.version) if part is not None))
        if folder is not None:
            return Path(folder)
    return None


def output_file(trainer: pl.Trainer, display_name: str, ending: str) -> Path | None:
    """Return the path of an output file in the folder of the logs, named after a technique's class and name.

    Args:
        trainer: The trainer; the result is ``None`` if no logger has a folder.
        display_name: Class and name, as in ``"NMSparsity[late]"``.
        ending: End of the file name.

    Example:
        >>> from lightning.pytorch.loggers import CSVLogger
        >>> trainer = pl.Trainer(logger=CSVLogger("logs", "", ""), accelerator="cpu", enable_checkpointing=False)
        >>> output_file(trainer, "NMSparsity[late]", ".csv").as_posix()
        'logs/nm_sparsity_late.csv'
    """
    folder = output_folder(trainer)
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", display_name.partition("[")[0]).lower()
    name = display_name.partition("[")[2].removesuffix("]")
    stem = re.sub(r"[^\w.-]+", "_", "_".join(filter(None, (words, name))))
    return None if folder is None else folder / f"{stem}{ending}"


@contextmanager
def tolerated(display_name: str, what: str) -> Iterator[None]:
    """Turn errors inside the block into warnings: training should not stop because a file or figure fails.

    Args:
        display_name: Class and name of the technique.
        what: The result of the block, as in ``"the figure of the run"``.
    """
    try:
        yield
    except Exception as error:
        rank_zero_warn(f"{display_name}: {what} could not be created: {type(error).__name__}: {error}")


def log_settings(trainer: pl.Trainer, name: str, settings: Mapping[str, Any]) -> None:
    """Write a technique's settings to the config (W&B) or hyperparameters (CSV, TensorBoard) of the run."""
    for logger in _loggers(trainer):
        logger.log_hyperparams({name: dict(settings)})


def log_many(trainer: pl.Trainer, values: Mapping[str, float]) -> None:
    """Log many scalars of a step at once, like ``LearningRateMonitor``.

    ``pl_module.log`` takes half a millisecond per scalar. Use it for a few scalars, and this function for per-layer
    ones.
    """
    trainer.callback_metrics.update({key: torch.tensor(value) for key, value in values.items()})
    for logger in _loggers(trainer) if values else []:
        logger.log_metrics(dict(values), step=stepped_batches(trainer))


def log_summary(trainer: pl.Trainer, values: Mapping[str, float]) -> None:
    """Write final results to the summary of the run, or as scalars if a logger has no summary."""
    for logger in _loggers(trainer) if values else []:
        summary = getattr(_experiment(logger), "summary", None)
        if summary is not None and hasattr(summary, "update"):
            summary.update(dict(values))
        else:
            # At the last step that was made, where the curve of the same quantity ends.
            logger.log_metrics(dict(values), step=max(stepped_batches(trainer) - 1, 0))
            logger.save()


def say_if_no_figures(trainer: pl.Trainer, asking: object) -> None:
    """Print once per fit that figures will be missing because matplotlib is not installed.

    Args:
        trainer: The trainer; nothing is printed if no logger has a folder.
        asking: The calling callback or strategy; the first one with ``figure=True`` prints for all.
    """
    techniques = (*trainer.callbacks, trainer.strategy)  # type: ignore[attr-defined]
    # log_key identifies our own techniques: other callbacks may have an unrelated attribute figure.
    drawing = [one for one in techniques if hasattr(one, "log_key") and getattr(one, "figure", False)]
    first = bool(drawing) and drawing[0] is asking
    if first and not is_installed("matplotlib") and output_folder(trainer) is not None:
        names = listed((one.display_name for one in drawing), most=len(drawing))
        rank_zero_info(
            f"Figures need matplotlib, which is not installed. Without figures: {names}. "
            "Run: pip install 'lightning-grad[plot]'."
        )


def log_figure(trainer: pl.Trainer, key: str, drawn: Figure | Callable[[], Figure], path: Path | None) -> None:
    """Save a figure as PNG and send it to loggers that show images; does nothing without matplotlib."""
    if path is None or not trainer.is_global_zero or not is_installed("matplotlib"):
        return
    figure = drawn() if callable(drawn) else drawn
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    _send_image(trainer, key, path, "add_figure", figure, "", close=False)


def log_picture(trainer: pl.Trainer, key: str, pixels: NDArray[np.uint8], path: Path | None, caption: str = "") -> None:
    """Save pixels (H, W) or (H, W, 3) as PNG and send it to loggers that show images; does nothing without Pillow."""
    if path is None or not trainer.is_global_zero or not is_installed("PIL"):
        return
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    _send_image(trainer, key, path, "add_image", pixels, caption, dataformats="HW" if pixels.ndim == 2 else "HWC")


def _send_image(trainer: pl.Trainer, key: str, path: Path, method: str, image: Any, caption: str, **more: Any) -> None:
    """Send an image as a file (W&B), or as an object to a method of the logger's experiment (TensorBoard)."""
    step = stepped_batches(trainer)
    for logger in _loggers(trainer):
        if hasattr(logger, "log_image"):
            logger.log_image(key=key, images=[str(path)], step=step, **({"caption": [caption]} if caption else {}))
        elif hasattr(_experiment(logger), method):
            getattr(_experiment(logger), method)(key, image, global_step=step, **more)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with equal keys to a CSV file atomically: if the process is killed, the old file remains."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(rows[0])
        writer.writerows(row.values() for row in rows)
    part.replace(path)


def log_table(
    trainer: pl.Trainer, key: str, rows: Sequence[Mapping[str, Any]], path: Path | None, pictures: Sequence[Any] = ()
) -> None:
    """Save rows with equal keys as CSV, and send them to loggers that show tables.

    Args:
        trainer: The trainer whose loggers get the table.
        key: Log key of the table.
        rows: Rows of the table.
        path: Path of the CSV file; ``None`` (no folder for logs) writes and sends nothing.
        pictures: A uint8 array (H, W) or (H, W, 3), or ``None``, for each row.
            They become a column ``picture`` in W&B tables if Pillow is installed, and are ignored elsewhere.
    """
    if path is None or not trainer.is_global_zero or not rows:
        return
    write_csv(path, rows)
    data, step = [list(row.values()) for row in rows[:_MOST_ROWS]], stepped_batches(trainer)
    columns, pictures = list(rows[0]), pictures[:_MOST_ROWS]
    for logger in _loggers(trainer):
        if hasattr(logger, "log_table"):
            images = _images(logger, pictures)
            shown = [[image, *line] for image, line in zip(images, data, strict=True)] if images else data
            logger.log_table(key=key, columns=[*(["picture"] if images else []), *columns], data=shown, step=step)
        elif hasattr(_experiment(logger), "add_text"):
            lines = [columns, ["---"] * len(columns), *data[:_MOST_TEXT_ROWS]]
            text = "\n".join("| " + " | ".join(map(_text_cell, line)) + " |" for line in lines)
            _experiment(logger).add_text(key, text, global_step=step)


def _images(logger: Any, pictures: Sequence[Any]) -> list[Any]:
    """Convert pictures for a table of W&B; an empty list for other loggers, or if there are no pictures."""
    if all(picture is None for picture in pictures) or not _is_wandb(logger) or not is_installed("PIL"):
        return []
    import wandb

    return [None if picture is None else wandb.Image(picture) for picture in pictures]


def _text_cell(value: Any) -> str:
    return " ".join(str(value).replace("|", "\\|").split())


def log_histograms(trainer: pl.Trainer, tensors: Mapping[str, Tensor]) -> None:
    """Send histograms of finite values to loggers that show them (W&B, TensorBoard)."""
    if not trainer.is_global_zero:
        return
    finite = {key: tensor.detach()[tensor.detach().isfinite()].float().cpu() for key, tensor in tensors.items()}
    values, step = {key: tensor for key, tensor in finite.items() if len(tensor)}, stepped_batches(trainer)
    for logger in _loggers(trainer):
        experiment = _experiment(logger)
        if hasattr(experiment, "add_histogram"):
            for key, value in values.items():
                experiment.add_histogram(key, value, global_step=step)
        elif _is_wandb(logger):
            import wandb

            logger.log_metrics({key: wandb.Histogram(value) for key, value in values.items()}, step=step)


def log_file(trainer: pl.Trainer, path: Path, name: str, kind: str, aliases: Sequence[str] = ()) -> None:
    """Send a file as an artifact to loggers that store artifacts (W&B).

    Args:
        trainer: The trainer whose loggers get the file.
        path: The file.
        name: Name of the artifact; files with equal names, even of other runs, are its versions.
        kind: Type of the artifact.
        aliases: Aliases of this version, in addition to "latest".
    """
    for experiment in map(_experiment, _loggers(trainer)):
        if hasattr(experiment, "log_artifact") and hasattr(experiment, "use_artifact"):
            own, *names = (re.sub(r"[^\w.-]+", "_", word, flags=re.ASCII) for word in (name, "latest", *aliases))
            experiment.log_artifact(str(path), own[:_LONGEST_NAME], kind, names)


def send_alert(trainer: pl.Trainer, title: str, text: str) -> None:
    """Send an alert to loggers that support alerts (W&B)."""
    for experiment in map(_experiment, _loggers(trainer)):
        if hasattr(experiment, "alert"):
            experiment.alert(title=title, text=text)


def _loggers(trainer: pl.Trainer) -> Sequence[Any]:
    """Return the loggers to write to: all on rank zero, none on other ranks."""
    return trainer.loggers if trainer.is_global_zero else []


def _experiment(logger: Any) -> Any:
    return getattr(logger, "experiment", None)


def _is_wandb(logger: Any) -> bool:
    return hasattr(logger, "log_image") and hasattr(_experiment(logger), "log_artifact")


def limit_layers(values: Mapping[str, float], layer_depth: int | None, max_layers: int) -> dict[str, float]:
    """Reduce per-layer values to a number of log keys that a dashboard can show.

    Args:
        values: Value of each layer by name.
        layer_depth: Average layers whose first ``layer_depth`` name parts agree; ``None`` averages none.
        max_layers: Number of layers to keep, in the order of the module.

    Example:
        >>> limit_layers({"a.0.x": 1.0, "a.0.y": 3.0, "b": 5.0}, layer_depth=2, max_layers=8)
        {'a.0': 2.0, 'b': 5.0}
    """
    joined: dict[str, list[float]] = {}
    for name, value in values.items():
        joined.setdefault(name if layer_depth is None else ".".join(name.split(".")[:layer_depth]), []).append(value)
    return {name: sum(found) / len(found) for name, found in list(joined.items())[:max_layers]}


def counted(count: int, noun: str) -> str:
    """Return a number with its noun.

    Example:
        >>> counted(1, "parameter"), counted(2, "parameter")
        ('1 parameter', '2 parameters')
    """
    return f"{count} {noun}{'' if count == 1 else 's'}"


def first_sentence(error: Exception) -> str:
    """Return the first sentence of an error, without the advice that follows, which may not apply elsewhere."""
    return str(error).partition(". ")[0].removesuffix(".")


def listed(names: Iterable[object], most: int = 5) -> str:
    """Join the first names of a list for use in a sentence.

    Example:
        >>> listed("abc"), listed("abc", most=2)
        ('a, b, c', 'a, b, ...')
    """
    known = [str(name) for name in names]
    return ", ".join([*known[:most], *(["..."] if len(known) > most else [])])


def format_table(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    """Format rows as a text table with aligned columns.

    Example:
        >>> print(format_table([["a", 1], ["bb", 22]], ["name", "n"]))
        name  n
        a     1
        bb    22
    """
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join(lines)
