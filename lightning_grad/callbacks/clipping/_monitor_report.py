"""What ``GradientMonitor`` leaves behind: facts of the first bad step, summary, table and figure."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from lightning_grad.callbacks.clipping._monitor_record import MonitorRecord
from lightning_grad.utilities.imports import is_installed
from lightning_grad.utilities.reporting import (
    log_figure,
    log_file,
    log_summary,
    log_table,
    output_folder,
    send_alert,
)


def tell_first_bad(
    trainer: pl.Trainer, facts: Mapping[str, Any], label: str, key: Callable[[str], str], stem: str, alert: bool
) -> None:
    """Say which step was the first bad one, and leave its facts in a file."""
    text = (
        f"the gradient was not finite for the first time at step {facts['step']}, epoch {facts['epoch']}, batch "
        f"{facts['batch_idx']}, loss {facts['loss']:g}: {facts['parameter']}, first of {facts['bad_parameters']}."
    )
    rank_zero_warn(f"{label}: {text}")
    log_summary(trainer, {key(f"first_bad_{fact}"): float(facts[fact]) for fact in ("step", "batch_idx")})
    folder = output_folder(trainer)
    if folder is not None and trainer.is_global_zero:
        path = folder / f"{stem}_first_bad_step.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**facts, "loss": str(facts["loss"]), "norm": str(facts["norm"])}, indent=2))
        log_file(trainer, path, name=path.stem, kind="facts")
    if alert:
        send_alert(trainer, f"{label}: gradient not finite", text)


def write_record(
    trainer: pl.Trainer, record: MonitorRecord, key: Callable[[str], str], path: Path | None, title: str, draw: bool
) -> None:
    """Send the figures of merit, and write the record as ``path.csv`` and, if wanted and possible, as ``path.png``."""
    counts = record.counts
    merit = {"clipped_share": counts["clipped"] / counts["steps"], "skipped_steps": float(counts["skipped"])}
    log_summary(trainer, {key(f"final_{name}"): value for name, value in merit.items()})
    if path is None:
        return
    log_table(trainer, key("record"), record.rows(), path.with_name(f"{path.name}.csv"))
    if draw and trainer.is_global_zero and is_installed("matplotlib"):
        log_figure(trainer, key("figure"), record.draw(title), path.with_name(f"{path.name}.png"))
