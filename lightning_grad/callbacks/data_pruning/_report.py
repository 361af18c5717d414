"""What a scoring leaves with the logs: the figure of the scores, and the hardest and easiest samples to look at.

``_samples.py`` looks at items, ``_pictures.py`` draws; here is decided which samples are shown, and where everything goes.
"""

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


def report_scores(
    trainer: pl.Trainer, scored: ScoredSet, dataset: Any, owner: Recorder, num_shown: int, figure: bool
) -> None:
    """Write the figure of the scores, and the hardest and easiest samples as table and figure.

    To be called on every rank; rank zero writes, into the folder of the logs, and nobody does if there is none. The files
    begin with the display name and the epoch, as in ``data_pruning_epoch5_samples.csv``. What cannot be read or drawn is
    warned of, and training goes on. The random streams of Python, numpy and torch stay where they are.

    Args:
        trainer: Whose loggers get the figures and the table.
        scored: The samples with their scores.
        dataset: Whose items are shown; the first tensor, array, PIL image or text of an item is taken for its input. Its
            ``classes``, if it has them, name the classes.
        owner: The callback, whose name is in log keys and files.
        num_shown: Number of hardest and of easiest samples to show; 0 shows none, and reads none.
        figure: Whether to draw figures, which takes matplotlib; the table is written without it.
    """
    if not trainer.is_global_zero or output_folder(trainer) is None:
        return
    display_name, names, ending = owner.display_name, None, f"_epoch{scored.epoch}_"
    with tolerated(display_name, "the list of class names"):
        names = class_names_of(dataset)
    title = f"{display_name}: {scored.name} after {counted(scored.epoch, 'epoch')}"
    if figure:
        with tolerated(display_name, "the figure of the scores"):
            path = output_file(trainer, display_name, f"{ending}scores.png")
            log_figure(trainer, owner.log_key("scores_figure"), partial(draw_scores, scored, title, names), path)
    if num_shown == 0:
        return
    with tolerated(display_name, "the report of samples"):
        groups = _samples(scored, dataset, display_name, num_shown, names)
        samples = [sample for group in groups for sample in group]
        if not samples:
            rank_zero_warn(f"{display_name}: no sample is shown, for none of {len(scored.values)} has a score.")
            return
        pictures = [sample.picture for sample in samples]
        with tolerated(display_name, "the table of samples"):
            columns = ["index", "score", "rank", "label", "prediction", "kept"]
            rows = [{column: getattr(sample, column) for column in columns} for sample in samples]
            if any(picture is None for picture in pictures):
                rows = [{**row, "input": sample.text} for row, sample in zip(rows, samples, strict=True)]
            path = output_file(trainer, display_name, f"{ending}samples.csv")
            log_table(trainer, owner.log_key("samples"), rows, path, pictures)
        if figure and any(picture is not None for picture in pictures):
            with tolerated(display_name, "the figure of samples"):
                path = output_file(trainer, display_name, f"{ending}samples.png")
                log_figure(trainer, owner.log_key("samples_figure"), partial(draw_samples, groups, title), path)


# Which samples are shown.


def _samples(
    scored: ScoredSet, dataset: Any, display_name: str, num_shown: int, class_names: Sequence[str] | None
) -> tuple[list[Sample], list[Sample]]:
    """Return the hardest and the easiest samples, hardest first, none of them in both."""
    order = torch.argsort(scored.values, descending=True, stable=True)
    ordered = order[~scored.values[order].isnan()]
    hard = min(num_shown, (len(ordered) + 1) // 2)
    easy = min(num_shown, len(ordered) - hard)
    ranks = [*range(hard), *range(len(ordered) - easy, len(ordered))]
    chosen = ordered[ranks]
    kept = torch.ones(len(ranks)) if scored.kept is None else torch.isin(chosen, scored.kept.cpu())
    samples, indices = [], chosen.tolist()
    for rank, index, keeps, view in zip(ranks, indices, kept, _views(dataset, indices, display_name), strict=True):
        truth, answer = _class_of(scored.labels, index), _class_of(scored.predictions, index)
        wrong = None not in (truth, answer) and truth != answer
        shown = named(truth, class_names), named(answer, class_names), wrong, bool(keeps), *view
        samples.append(Sample(index, rank, float(scored.values[index]), *shown))
    return samples[:hard], samples[hard:]


def _views(dataset: Any, indices: Sequence[int], display_name: str) -> list[Any]:
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
        rank_zero_warn(
            f"{display_name}: {len(faults)} of {len(indices)} samples cannot be shown. The first is {faults[0]}"
        )
    return views


def _class_of(classes: Tensor | None, index: int) -> int | None:
    return None if classes is None or int(classes[index]) < 0 else int(classes[index])
