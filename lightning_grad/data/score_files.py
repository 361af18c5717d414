"""Files of sample scores, saved with a fingerprint of the data set and checked against it on loading."""

import csv
import dataclasses
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_grad.data.damaged_files import errors_that_name, read_entries
from lightning_grad.data.fingerprints import Fingerprint, fingerprint

_FORMAT = 1
_SCORE_COLUMNS = ("score", "scores", "value", "values", "metric")
_INDEX_COLUMNS = ("index", "idx", "id")
_NAME_COLUMNS = ("name", "filename", "file", "path", "image")


@dataclass(frozen=True, eq=False)
class SampleScores:
    """Scores of the samples of one data set, higher = harder.

    Attributes:
        values: (n,) float64; nan for samples that could not be scored.
        name: Name of the score, such as ``"el2n"``.
        epoch: Number of epochs that the scoring model had been trained; ``None`` if unknown.
        seed: Seed of that run.
        fingerprint: Fingerprint of the data set; ``None`` disables its check.
        labels: (n,) int64: the class of each sample.
        index: (n,) int64: index in the data set of each value; ``None`` for 0 to n - 1.

    Raises:
        ValueError: If the shapes do not match, or an index is negative or occurs twice.

    Example:
        >>> SampleScores(torch.tensor([0.1, 0.9]), "el2n", index=torch.tensor([3, 1])).dense(4)
        tensor([   nan, 0.9000,    nan, 0.1000], dtype=torch.float64)
    """

    values: Tensor
    name: str
    epoch: float | None = None
    seed: int | None = None
    fingerprint: Fingerprint | None = None
    labels: Tensor | None = None
    index: Tensor | None = None

    def __post_init__(self) -> None:
        values = torch.as_tensor(self.values).detach().to("cpu", torch.float64)
        if values.ndim != 1:
            raise ValueError(f"SampleScores needs one value per sample, (n,); got shape {tuple(values.shape)}.")
        object.__setattr__(self, "values", values)
        for key in ("labels", "index"):
            given = getattr(self, key)
            if given is None:
                continue
            given = torch.as_tensor(given).detach().to("cpu", torch.int64)
            if given.shape != values.shape:
                raise ValueError(f"SampleScores has {len(values)} values, but {key} has shape {tuple(given.shape)}.")
            object.__setattr__(self, key, given)
        if len(values) and (self.items.min() < 0 or len(set(self.items.tolist())) < len(values)):
            raise ValueError("SampleScores needs distinct indices >= 0; got a negative or duplicate one.")

    @property
    def items(self) -> Tensor:
        """Index in the data set of each value, (n,), also if ``index`` is ``None``."""
        return torch.arange(len(self.values)) if self.index is None else self.index

    def dense(self, total: int) -> Tensor:
        """Return one value for each of ``total`` items of the data set, nan for items without a score.

        Raises:
            ValueError: If a score has an index of ``total`` or more.
        """
        items = self.items
        if len(items) and int(items.max()) >= total:
            raise ValueError(
                f"The scores {self.name!r} reach to item {int(items.max())}, but the data set has {total} items. "
                "Use the scores of this data set and split."
            )
        return torch.full((total,), torch.nan, dtype=torch.float64).index_copy_(0, items, self.values)


def _entries(scores: SampleScores) -> dict[str, Any]:
    entries = {
        "format": _FORMAT,
        "scores": scores.values.numpy(),
        "index": scores.items.numpy(),
        "name": scores.name,
        "epoch": scores.epoch,
        "seed": scores.seed,
        "labels": None if scores.labels is None else scores.labels.numpy(),
    }
    if scores.fingerprint is not None:
        entries |= {f"fingerprint_{key}": value for key, value in dataclasses.asdict(scores.fingerprint).items()}
    return {key: np.asarray(value) for key, value in entries.items() if value is not None}


def score_path(path: str | os.PathLike[str]) -> Path:
    """Return the path that :func:`save_scores` writes to, with the suffix ``.npz``.

    Raises:
        ValueError: If the path is a folder.

    Example:
        >>> score_path("scores/el2n").name
        'el2n.npz'
    """
    found = Path(path)
    if not found.name or found.name == ".." or os.path.isdir(path):
        raise ValueError(f"Scores cannot be written to {os.fspath(path)!r}, because it is a folder. Name a .npz file.")
    return found if found.suffix == ".npz" else found.with_name(f"{found.name}.npz")


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise unless :func:`save_scores` can write to a path. The folder is created if it is missing.

    Raises:
        OSError: If the folder cannot be created or written to.
    """
    with _part_of(score_path(path)) as part:
        part.touch()


@contextmanager
def _part_of(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to a file, which is removed at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
    finally:
        part.unlink(missing_ok=True)


def save_scores(scores: SampleScores, path: str | os.PathLike[str]) -> Path:
    """Write scores to a ``.npz`` file.

    The file contains the arrays ``scores`` and ``index``, optionally ``labels``, and ``name``, ``epoch``, ``seed`` and
    the parts of the fingerprint. ``numpy.load`` reads it without pickle. It is written atomically.

    Args:
        scores: The scores to write.
        path: File to write; ``.npz`` is added if it is missing.

    Returns:
        Path: The file written.

    Raises:
        ValueError: If the path is a folder.
    """
    path = score_path(path)
    with _part_of(path) as part:
        with part.open("wb") as file:
            np.savez(file, **_entries(scores))
        part.replace(path)
    return path


def _from_entries(entries: Mapping[str, Any]) -> SampleScores:
    """Create scores from the arrays of a file, checking their types."""

    def plain(key: str, *kinds: type) -> Any:
        value = entries[key].item() if key in entries else None
        if value is not None and not isinstance(value, kinds):
            raise ValueError(f"its {key} is {value!r}")
        return value

    found = None
    if "fingerprint_length" in entries:
        kinds = {"length": int, "class_name": str, "items": str, "samples": int, "seed": int}
        found = Fingerprint(**{key: plain(f"fingerprint_{key}", kind) for key, kind in kinds.items()})
    values, index = _numbers(entries, "scores", "fiub"), _numbers(entries, "index", "iu")
    labels = _numbers(entries, "labels", "iu") if "labels" in entries else None
    is_whole = torch.equal(index, torch.arange(len(values)))
    name, epoch, seed = plain("name", str), plain("epoch", int, float), plain("seed", int)
    return SampleScores(values, name, epoch, seed, found, labels, None if is_whole else index)


def _numbers(entries: Mapping[str, Any], key: str, kinds: str) -> Tensor:
    array = entries[key]
    if array.dtype.kind not in kinds or array.ndim != 1:
        raise ValueError(f"its {key} hold {array.dtype} of shape {array.shape}")
    return torch.from_numpy(array.astype(np.float64 if "f" in kinds else np.int64))


def _load_npz(path: Path) -> SampleScores:
    with errors_that_name(path):
        entries = read_entries(path)
        version = int(entries.get("format", 0))
    missing = {"format", "scores", "index", "name"} - set(entries)
    if missing:
        raise ValueError(
            f"{path} is not a score file: it lacks {', '.join(sorted(missing))}. Name a file of save_scores."
        )
    if version > _FORMAT:
        raise ValueError(f"{path} was written by a later version of lightning-grad. Update lightning-grad to read it.")
    with errors_that_name(path):
        return _from_entries(entries)


def _column(columns: Sequence[str], known: Sequence[str]) -> str | None:
    return next((column for column in columns if column.strip().lower() in known), None)


def _positions(names: Sequence[str], dataset: Any) -> Tensor | None:
    """Return the index of each file name in an ImageFolder-like data set; None if it has no ``samples``."""
    samples = getattr(dataset, "samples", None)
    if samples is None:
        return None
    where = {os.path.basename(str(sample[0])): i for i, sample in enumerate(samples)}
    unknown = [name for name in names if os.path.basename(name) not in where]
    if unknown:
        raise ValueError(
            f"The data set has no file {unknown[0]!r} ({len(unknown)} names of the score table are unknown). Use the "
            "table of this data set, or delete the rows of other files."
        )
    return torch.tensor([where[os.path.basename(name)] for name in names])


def _load_csv(path: Path, dataset: Any) -> SampleScores:
    """Read scores from a table, whose columns are recognized by their names."""
    with errors_that_name(path), path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        rows, columns = list(reader), list(reader.fieldnames or [])
    index, name = _column(columns, _INDEX_COLUMNS), _column(columns, _NAME_COLUMNS)
    others = [column for column in columns if column not in (index, name)]
    score = _column(others, _SCORE_COLUMNS) or (others[0] if len(others) == 1 else None)
    if score is None or not rows:
        raise ValueError(
            f"{path} must have a header, one column of scores (named 'score' if there are others) and optionally a "
            f"column 'index' or 'filename'; got the columns {', '.join(map(repr, columns)) or 'none'}, {len(rows)} "
            "rows. Name the column of scores 'score'."
        )
    try:
        values = torch.tensor([float(row[score]) for row in rows], dtype=torch.float64)
        given = torch.tensor([int(row[index]) for row in rows]) if index else None
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{path} has a row whose score or index is not a number ({error}). Correct it.") from error
    if given is None and name is not None:
        given = _positions([row[name] for row in rows], dataset)
    title = path.stem if score.strip().lower() in _SCORE_COLUMNS else score.strip()
    with errors_that_name(path):
        return SampleScores(values, title, index=given)


def _mismatches(scores: SampleScores, dataset: Any) -> list[str]:
    if scores.fingerprint is not None:
        recorded = scores.fingerprint
        return recorded.differences(fingerprint(dataset, recorded.samples, recorded.seed))
    total, reach = len(dataset), len(scores.values) if scores.index is None else int(scores.index.max()) + 1
    fits = reach == total if scores.index is None else reach <= total
    return [] if fits else [f"the length ({reach} against {total})"]


def load_scores(path: str | os.PathLike[str], dataset: Any = None, strict: bool = True) -> SampleScores:
    """Read scores from a file, and check that they belong to a data set.

    A ``.csv`` table needs a header and one column of scores, named ``score`` if there are others. A column ``index``
    contains the index of each row in the data set. Alternatively a column ``filename`` identifies items by the last
    part of their path, if the data set has ``samples`` like torchvision's ``ImageFolder``. Without either column, rows
    are in the order of the data set. A table has no fingerprint, so only its length is checked. Higher must mean
    harder, as in the ImageNet tables of github.com/rgeirhos/dataset-pruning-metrics, where samples with a high score
    are worth keeping.

    Args:
        path: A ``.npz`` file of :func:`save_scores`, or a ``.csv`` table.
        dataset: The data set that the scores should belong to; ``None`` disables the check.
        strict: Raise an error for a mismatch; False warns instead.

    Returns:
        SampleScores: The scores in the file.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is unreadable, damaged or not a score file, or its scores belong to another data set.
    """
    path = Path(path)
    scores = _load_csv(path, dataset) if path.suffix.lower() == ".csv" else _load_npz(path)
    differences = [] if dataset is None else _mismatches(scores, dataset)
    if differences:
        message = (
            f"The scores in {path} belong to another data set: {' and '.join(differences)} "
            f"{'differs' if len(differences) == 1 else 'differ'} (score file against data set). "
            "Score this data set, or use strict=False if you know that the items are the same."
        )
        if strict:
            raise ValueError(message)
        warnings.warn(message, stacklevel=2)
    return scores


def _check_alike(first: SampleScores, other: SampleScores) -> None:
    """Raise unless two scores are of one kind and of the same samples."""
    if other.name != first.name:
        raise ValueError(
            f"Scores must be of one kind to be averaged; got {first.name!r} and {other.name!r}. Pass files of one "
            "score."
        )
    found, there = first.fingerprint, other.fingerprint
    differences = found.differences(there) if found and there else []
    if differences:
        raise ValueError(
            f"Scores must belong to one data set to be averaged; {' and '.join(differences)} differ. Name files of one."
        )
    labels = [scores.labels for scores in (first, other) if scores.labels is not None]
    same = {"indices": torch.equal(first.items, other.items), "labels": len(labels) < 2 or torch.equal(*labels)}
    for key in (key for key, agrees in same.items() if not agrees):
        raise ValueError(f"Scores must be of the same samples to be averaged; their {key} differ. Name other files.")


def average_scores(scores: Sequence[SampleScores | str | os.PathLike[str]]) -> SampleScores:
    r"""Average a score over several runs, as recommended for EL2N and GraNd.

    .. math::
        \bar s_i = \frac{1}{|R_i|} \sum_{r \in R_i} s_{ir}

    :math:`R_i` are the runs that scored sample i; the mean is nan if there are none.

    Args:
        scores: One or more scores, or paths of score files: the same score of the same samples.

    Returns:
        SampleScores: The mean. Epoch and seed are ``None`` unless equal in all runs.

    Raises:
        ValueError: If there are no scores, or they differ in name, data set or samples.

    Example:
        >>> runs = [SampleScores(torch.tensor(s), "el2n") for s in ([0.2, 1.0], [0.4, torch.nan])]
        >>> average_scores(runs).values
        tensor([0.3000, 1.0000], dtype=torch.float64)

    References:
        Paul et al., "Deep Learning on a Data Diet", 2021, arXiv 2107.07075, section 2: the mean over ten runs.
    """
    loaded = [item if isinstance(item, SampleScores) else load_scores(item) for item in scores]
    if not loaded:
        raise ValueError("average_scores needs at least one score file; got none. Pass at least one.")
    first = loaded[0]
    for other in loaded[1:]:
        _check_alike(first, other)
    epochs, seeds = {item.epoch for item in loaded}, {item.seed for item in loaded}
    return dataclasses.replace(
        first,
        values=torch.stack([item.values for item in loaded]).nanmean(0),
        epoch=epochs.pop() if len(epochs) == 1 else None,
        seed=seeds.pop() if len(seeds) == 1 else None,
        labels=next((item.labels for item in loaded if item.labels is not None), None),
        fingerprint=next((item.fingerprint for item in loaded if item.fingerprint is not None), None),
    )
