"""What a scoring leaves beside the logs: the figure of the scores, and the hardest and easiest samples to look at.

``_samples.py`` looks at items, ``_pictures.py`` draws, ``_page.py`` writes the page; here is decided which samples are shown,
and where everything goes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_grad.callbacks.data_pruning._page import page_of
from lightning_grad.callbacks.data_pruning._pictures import draw_samples, draw_scores
from lightning_grad.callbacks.data_pruning._samples import Sample, named, view_of
from lightning_grad.callbacks.data_pruning._scored import ScoredSet
from lightning_grad.utilities.imports import is_installed
from lightning_grad.utilities.reporting import log_figure, log_table, output_folder


def report(
    trainer: pl.Trainer,
    scored: ScoredSet,
    dataset: Any,
    label: str,
    show: int,
    figure: bool,
    class_names: Sequence[str] | None = None,
) -> None:
    """Write the figure of the scores, and the hardest and easiest samples as figure, page and table.

    To be called on every rank; rank zero writes, into the folder of the logs, and nobody does if there is none. The files
    begin with the label and the epoch, as in ``data_pruning_epoch5_samples.html``. What cannot be read or drawn is warned
    of, and training goes on. The random streams of Python, numpy and torch stay where they are.

    Args:
        trainer: Whose loggers get the figures and the table.
        scored: The samples with their scores.
        dataset: Whose items are shown; the first tensor, array, PIL image or text of an item is taken for its input.
        label: Class and name of the callback, ``"DataPruning[late]"`` say.
        show: Number of hardest and of easiest samples to show; 0 shows none, and reads none.
        figure: Whether to draw figures, which takes matplotlib; page and table are written without it.
        class_names: Name of each class.
    """
    folder = output_folder(trainer) if trainer.is_global_zero else None
    if folder is None:
        return
    technique, name = re.fullmatch(r"([^\[]*)(?:\[(.*)\])?", label, re.DOTALL).groups(default="")  # type: ignore[union-attr]
    path = folder / f"{_stem(technique, name)}_epoch{scored.epoch}"
    key = "/".join(part for part in ("data", name) if part)
    title = f"{label}: {scored.name} after {_counted(scored.epoch, 'epoch')}"
    draws = figure and _can_draw(label)
    if draws:
        with _tolerated(label, "the figure of the scores"):
            drawn = draw_scores(scored, title, class_names)
            log_figure(trainer, f"{key}/scores_figure", drawn, _beside(path, "scores.png"))
    if show > 0:
        with _tolerated(label, "the report of samples"):
            hardest, easiest = _samples(scored, dataset, label, show, class_names)
            _write_samples(trainer, scored, (hardest, easiest), key, path, title, draws, label)


def _write_samples(
    trainer: pl.Trainer,
    scored: ScoredSet,
    groups: tuple[list[Sample], list[Sample]],
    key: str,
    path: Path,
    title: str,
    draws: bool,
    label: str,
) -> None:
    samples = [sample for group in groups for sample in group]
    if not samples:
        rank_zero_warn(f"{label}: no sample is shown, for none of {len(scored.values)} has a score.")
        return
    with _tolerated(label, "the page of samples"):
        page = _beside(path, "samples.html")
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(page_of(scored, groups, title), encoding="utf-8", errors="replace")
    pictures = [sample.picture for sample in samples]
    with _tolerated(label, "the table of samples"):
        rows = [_row(sample, texts=any(picture is None for picture in pictures)) for sample in samples]
        log_table(trainer, f"{key}/samples", rows, _beside(path, "samples.csv"), pictures)
    if draws and any(picture is not None for picture in pictures):
        with _tolerated(label, "the figure of samples"):
            drawn = draw_samples(groups, title)
            log_figure(trainer, f"{key}/samples_figure", drawn, _beside(path, "samples.png"))


def _row(sample: Sample, texts: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"index": sample.index, "score": sample.score, "rank": sample.rank}
    row.update(label=sample.label, prediction=sample.prediction, kept=sample.kept)
    return {**row, "input": sample.text} if texts else row


# Which samples are shown.


def _samples(
    scored: ScoredSet, dataset: Any, label: str, show: int, class_names: Sequence[str] | None
) -> tuple[list[Sample], list[Sample]]:
    """Return the hardest and the easiest samples, hardest first, none of them in both."""
    ordered = _ordered(scored.values)
    hard = min(show, (len(ordered) + 1) // 2)
    easy = min(show, len(ordered) - hard)
    ranks = [*range(hard), *range(len(ordered) - easy, len(ordered))]
    indices = ordered[ranks].tolist()
    kept = torch.ones(len(indices), dtype=torch.bool)
    if scored.kept is not None:
        kept = torch.isin(ordered[ranks], scored.kept.cpu())
    views = _views(dataset, indices, label)
    samples = []
    for place, (rank, index) in enumerate(zip(ranks, indices, strict=True)):
        truth, answer = _class_of(scored.labels, index), _class_of(scored.predictions, index)
        picture, text = views[place]
        sample = Sample(
            index=index,
            rank=rank,
            score=float(scored.values[index]),
            label=named(truth, class_names),
            prediction=named(answer, class_names),
            wrong=None not in (truth, answer) and truth != answer,
            kept=bool(kept[place]),
            picture=picture,
            text=text,
        )
        samples.append(sample)
    return samples[:hard], samples[hard:]


def _ordered(values: Tensor) -> Tensor:
    """Return the indices of the samples that have a score, hardest first."""
    order = torch.argsort(values, descending=True, stable=True)
    return order[~values[order].isnan()]


def _views(dataset: Any, indices: Sequence[int], label: str) -> list[Any]:
    views, faults = [], []
    cuda = bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
    with isolate_rng(include_cuda=cuda):
        for index in indices:
            try:
                views.append(view_of(dataset[index]))
            except Exception as error:
                faults.append(f"sample {index}: {type(error).__name__}: {error}")
                views.append((None, f"not readable ({type(error).__name__})"))
    if faults:
        rank_zero_warn(f"{label}: {len(faults)} of {len(indices)} samples cannot be shown. The first is {faults[0]}")
    return views


def _class_of(classes: Tensor | None, index: int) -> int | None:
    known = classes is not None and int(classes[index]) >= 0
    return int(classes[index]) if known and classes is not None else None


# Names, and what may go wrong.


def _stem(technique: str, name: str) -> str:
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", technique).lower()
    return re.sub(r"[^\w.-]+", "_", "_".join(part for part in (words, name) if part))


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(f"{path.name}_{ending}")


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _can_draw(label: str) -> bool:
    if not is_installed("matplotlib"):
        _tell_once(f"{label}: no figures without matplotlib; pip install 'lightning-grad[plot]'.")
        return False
    return True


@cache
def _tell_once(text: str) -> None:
    rank_zero_info(text)


@contextmanager
def _tolerated(label: str, what: str) -> Iterator[None]:
    """Let a report fail without the training that it is about."""
    try:
        yield
    except Exception as error:
        rank_zero_warn(f"{label}: {what} could not be made: {type(error).__name__}: {error}")
