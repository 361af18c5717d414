"""What a scoring leaves with the logs: the figure of the scores, and the hardest and easiest samples to look at.

``_samples.py`` looks at items, ``_pictures.py`` draws; here is decided which samples are shown, and where everything goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_grad.callbacks.data_pruning._pictures import draw_samples, draw_scores
from lightning_grad.callbacks.data_pruning._samples import Sample, class_names_of, named, view_of
from lightning_grad.callbacks.data_pruning._scored import ScoredSet
from lightning_grad.core.record import Recorder
from lightning_grad.utilities.reporting import counted, log_figure, log_table, output_file, output_folder, tolerated


def report(trainer: pl.Trainer, scored: ScoredSet, dataset: Any, owner: Recorder, show: int, figure: bool) -> None:
    """Write the figure of the scores, and the hardest and easiest samples as table and figure.

    To be called on every rank; rank zero writes, into the folder of the logs, and nobody does if there is none. The files
    begin with the label and the epoch, as in ``data_pruning_epoch5_samples.csv``. What cannot be read or drawn is warned
    of, and training goes on. The random streams of Python, numpy and torch stay where they are.

    Args:
        trainer: Whose loggers get the figures and the table.
        scored: The samples with their scores.
        dataset: Whose items are shown; the first tensor, array, PIL image or text of an item is taken for its input. Its
            ``classes``, if it has them, name the classes.
        owner: The callback, whose name is in log keys and files.
        show: Number of hardest and of easiest samples to show; 0 shows none, and reads none.
        figure: Whether to draw figures, which takes matplotlib; the table is written without it.
    """
    if not trainer.is_global_zero or output_folder(trainer) is None:
        return
    label, names, ending = owner.label, None, f"_epoch{scored.epoch}_"
    with tolerated(label, "the list of class names"):
        names = class_names_of(dataset)
    title = f"{label}: {scored.name} after {counted(scored.epoch, 'epoch')}"
    if figure:
        with tolerated(label, "the figure of the scores"):
            path = output_file(trainer, label, f"{ending}scores.png")
            log_figure(trainer, owner.log_key("scores_figure"), partial(draw_scores, scored, title, names), path)
    if show == 0:
        return
    with tolerated(label, "the report of samples"):
        groups = _samples(scored, dataset, label, show, names)
        samples = [sample for group in groups for sample in group]
        if not samples:
            rank_zero_warn(f"{label}: no sample is shown, for none of {len(scored.values)} has a score.")
            return
        pictures = [sample.picture for sample in samples]
        has_texts = any(picture is None for picture in pictures)
        with tolerated(label, "the table of samples"):
            rows = [_row(sample, has_texts) for sample in samples]
            log_table(
                trainer, owner.log_key("samples"), rows, output_file(trainer, label, f"{ending}samples.csv"), pictures
            )
        if figure and any(picture is not None for picture in pictures):
            with tolerated(label, "the figure of samples"):
                path = output_file(trainer, label, f"{ending}samples.png")
                log_figure(trainer, owner.log_key("samples_figure"), partial(draw_samples, groups, title), path)


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
