"""The file that a scoring leaves."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl

from lightning_grad.data import SampleScores, save_scores
from lightning_grad.data.score_files import check_writable
from lightning_grad.utilities.reporting import log_file, output_folder


@dataclass(frozen=True)
class ScoreFile:
    """Where the scores of a callback go: to the file that it names, or next to the logs.

    Args:
        label: Class and name of the callback, for errors.
        name: Its name.
        path: What it names; ``None`` for a file next to the logs.
        several: Whether there are several rounds, whose files are told apart by their epoch.
    """

    label: str
    name: str | None
    path: str | None
    several: bool

    def check(self, trainer: pl.Trainer, last_epoch: int) -> None:
        """Raise on every rank if the file that is named cannot be written.

        Raises:
            ValueError: If the folder cannot be made or written to.
        """
        if self.path is None:
            return
        fault = None
        if trainer.is_global_zero:
            try:
                check_writable(self._numbered(self.path, last_epoch))
            except (OSError, ValueError) as error:
                fault = f"{self.label} cannot write save_scores={self.path!r}: {error}. Name a file that it can write."
        fault = trainer.strategy.broadcast(fault)  # else the other ranks would wait for the first
        if fault is not None:
            raise ValueError(fault)

    def write(self, trainer: pl.Trainer, scores: SampleScores, epoch: int) -> None:
        """Write the scores on rank zero, and send them to loggers that keep files."""
        if not trainer.is_global_zero:
            return
        folder = output_folder(trainer)
        stem = "_".join(part for part in ("scores", self.name, f"epoch{epoch}") if part)
        stem = re.sub(r"[^\w.-]+", "_", stem, flags=re.ASCII)  # it also names an artifact
        path = None if folder is None else folder / f"{stem}.npz"
        if self.path is not None:
            path = self._numbered(self.path, epoch)
        if path is not None:
            log_file(trainer, save_scores(scores, path), stem, "scores")

    def _numbered(self, path: str, epoch: int) -> Path:
        named = Path(path)
        return named.with_stem(f"{named.stem}_epoch{epoch}") if self.several else named
