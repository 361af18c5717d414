"""Report of a scoring: a figure of the scores, the hardest and easiest samples, and suspected label errors.

``_samples.py`` converts items, ``_pictures.py`` draws; this file selects the samples to show and writes the files.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from numpy.typing import NDArray
from torch import Tensor

from lightning_grad.callbacks.data_pruning._pictures import draw_samples, draw_scores
from lightning_grad.callbacks.data_pruning._samples import (
    OF_HARDNESS,
    OF_INFLUENCE,
    Sample,
    class_names_of,
    named,
    view_of,
)
from lightning_grad.callbacks.data_pruning._scored import ScoredSet
from lightning_grad.core.record import Recorder
from lightning_grad.utilities.reporting import counted, log_figure, log_table, output_file, output_folder, tolerated

View = tuple[NDArray[np.uint8] | None, str]


def report_scores(
    trainer: pl.Trainer,
    scored: ScoredSet,
    dataset: Any,
    owner: Recorder,
    num_shown: int,
    figure: bool,
    decode: Callable[[Any], Any] | None = None,
) -> None:
    """Write the figure of the scores, the hardest and easiest samples, and the samples whose label may be wrong.

    Call it on every rank. Rank zero writes into the folder of the logs; without such a folder nothing is
    written. File names begin with the display name and the epoch, as in ``data_pruning_epoch5_samples.csv``. If
    something cannot be read or drawn, it warns and training continues. The random streams of Python, numpy and
    torch do not change.

    Args:
        trainer: The trainer, whose loggers get the figures and tables.
        scored: The samples with their scores.
        dataset: The scored data set.
            The first tensor, array, PIL image or text of an item is taken as its input. If the data set has
            ``classes``, they name the classes.
        owner: The callback, whose name is part of log keys and file names.
        num_shown: Number of hardest and of easiest samples to show; 0 shows and reads none.
        figure: Whether to draw figures, which needs matplotlib; tables do not.
        decode: Callable (item) -> text or image to show instead of the item.
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
    with tolerated(display_name, "the report of samples"):
        ranks, indices = _most_telling(scored, num_shown)
        errors = scored.label_errors.tolist()
        views = _views(dataset, [*dict.fromkeys([*indices, *errors[:num_shown]])], display_name, decode)
        _report_label_errors(trainer, scored, errors, owner, names, views)
        if num_shown == 0:
            return
        groups = _samples(scored, ranks, indices, names, views)
        samples = [sample for group in groups for sample in group]
        if not samples:
            rank_zero_warn(
                f"{display_name} shows no samples, because none of the {len(scored.values)} samples has a score."
            )
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
                headings = OF_INFLUENCE if scored.is_influence else OF_HARDNESS
                log_figure(
                    trainer, owner.log_key("samples_figure"), partial(draw_samples, groups, title, headings), path
                )


def _report_label_errors(
    trainer: pl.Trainer,
    scored: ScoredSet,
    indices: Sequence[int],
    owner: Recorder,
    names: Sequence[str] | None,
    views: Mapping[int, View],
) -> None:
    """Write the samples whose prediction differs from their label, and count them by label and prediction."""
    pairs = [(_class_of(scored.labels, i), _class_of(scored.predictions, i)) for i in indices]

    def named_pair(pair: tuple[int | None, int | None]) -> dict[str, Any]:
        return {"label": named(pair[0], names), "suggested": named(pair[1], names)}

    rows: list[dict[str, Any]] = [
        {"index": index, **named_pair(pair), "score": float(scored.values[index])}
        for index, pair in zip(indices, pairs, strict=True)
    ]
    if any(picture is None for picture, _ in views.values()):
        rows = [{**row, "input": views[row["index"]][1] if row["index"] in views else ""} for row in rows]
    pictures = [views[index][0] if index in views else None for index in indices]
    # Counted before they are named, because two classes may have the same name.
    counts = [{**named_pair(pair), "samples": count} for pair, count in Counter(pairs).most_common()]
    _write(trainer, scored, owner, "label_errors", rows, pictures)
    _write(trainer, scored, owner, "label_pairs", counts)


def _write(
    trainer: pl.Trainer, scored: ScoredSet, owner: Recorder, what: str, rows: Any, pictures: Sequence[Any] = ()
) -> None:
    path = output_file(trainer, owner.display_name, f"_epoch{scored.epoch}_{what}.csv")
    log_table(trainer, owner.log_key(what), rows, path, pictures)


# Which samples are shown.


def _most_telling(scored: ScoredSet, num_shown: int) -> tuple[list[int], list[int]]:
    """Return ranks and indices of the hardest and the easiest samples, hardest first and without duplicates."""
    order = torch.argsort(scored.values, descending=True, stable=True)
    ordered = order[~scored.values[order].isnan()]
    hard = min(num_shown, (len(ordered) + 1) // 2)
    easy = min(num_shown, len(ordered) - hard)
    ranks = [*range(hard), *range(len(ordered) - easy, len(ordered))]
    return ranks, ordered[ranks].tolist()


def _samples(
    scored: ScoredSet,
    ranks: Sequence[int],
    indices: Sequence[int],
    class_names: Sequence[str] | None,
    views: Mapping[int, View],
) -> tuple[list[Sample], list[Sample]]:
    """Return the hardest and the easiest samples for the table and the figure."""
    kept = torch.ones(len(ranks)) if scored.kept is None else torch.isin(torch.tensor(indices), scored.kept.cpu())
    samples = []
    for rank, index, keeps in zip(ranks, indices, kept, strict=True):
        truth, answer = _class_of(scored.labels, index), _class_of(scored.predictions, index)
        wrong = None not in (truth, answer) and truth != answer
        shown = named(truth, class_names), named(answer, class_names), wrong, bool(keeps), *views[index]
        samples.append(Sample(index, rank, float(scored.values[index]), *shown))
    hard = (len(samples) + 1) // 2
    return samples[:hard], samples[hard:]


def _views(
    dataset: Any, indices: Sequence[int], display_name: str, decode: Callable[[Any], Any] | None
) -> dict[int, View]:
    """Return picture and text of items by index, and warn of items that cannot be read."""
    views, faults = {}, []
    cuda = bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
    with isolate_rng(include_cuda=cuda):
        for index in indices:
            try:
                item = dataset[index]
                views[index] = view_of(item if decode is None else decode(item))
            except Exception as error:
                faults.append(f"sample {index}: {type(error).__name__}: {error}")
                views[index] = None, f"not readable ({type(error).__name__})"
    if faults:
        rank_zero_warn(
            f"{display_name}: {len(faults)} of {len(indices)} samples cannot be shown. The first is {faults[0]}"
        )
    return views


def _class_of(classes: Tensor | None, index: int) -> int | None:
    return None if classes is None or int(classes[index]) < 0 else int(classes[index])
