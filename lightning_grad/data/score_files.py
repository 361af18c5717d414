"""Scores of samples in files: saved with a fingerprint of the data set, checked against it when they are loaded."""

from __future__ import annotations

import csv
import dataclasses
import enum
import hashlib
import os
import random
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_FORMAT = 1
_READ_TWICE = 8  # items, to find out whether the data set augments
_DEEPEST = 16
_SCORE_COLUMNS = ("score", "scores", "value", "values", "metric")
_INDEX_COLUMNS = ("index", "idx", "id")
_NAME_COLUMNS = ("name", "filename", "file", "path", "image")


@dataclass(frozen=True)
class Fingerprint:
    """What is remembered of a data set to know it again.

    Attributes:
        length: Number of items.
        class_name: Name of its class; that of a ``Subset`` also names what it is a subset of.
        items: Hash of the sampled items; ``None`` if two readings of one item differ.
        samples: How many items were to be sampled.
        seed: Seed of their choice.
    """

    length: int
    class_name: str
    items: str | None
    samples: int = 64
    seed: int = 0

    def differences(self, other: Fingerprint) -> list[str]:
        """Return in words what differs from another fingerprint; an empty list if it may be the same data set.

        The items decide: the same items in a data set of another class are the same data. Where items cannot be compared
        (one side augments, or they were sampled in another way), the names of the classes must agree.

        Example:
            >>> Fingerprint(100, "Digits", None).differences(Fingerprint(90, "Digits", None))
            ['the length (100 against 90)']
        """
        found = []
        if self.length != other.length:
            found.append(f"the length ({self.length} against {other.length})")
        sampled_alike = (self.samples, self.seed) == (other.samples, other.seed)
        if self.items is not None and other.items is not None and sampled_alike and self.length == other.length:
            if self.items != other.items:
                found.append("the items (another content, order, or transform)")
        elif self.class_name != other.class_name:
            found.append(f"the class ({self.class_name} against {other.class_name})")
        return found


def _class_name(dataset: Any) -> str:
    name = type(dataset).__name__
    return f"{name}[{_class_name(dataset.dataset)}]" if isinstance(dataset, torch.utils.data.Subset) else name


@contextmanager
def _random_streams_kept() -> Iterator[None]:
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cuda = torch.cuda.get_rng_state_all() if started else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def _seed_streams(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reach the generators of GPUs


def _tensor_bytes(tensor: Tensor) -> bytes:
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().tobytes()


def _parts(value: Any) -> tuple[str, list[Any]] | None:
    """Return a description of a container and what it holds, or None if the value is no container."""
    if isinstance(value, Mapping):
        entries = sorted(value.items(), key=lambda entry: (type(entry[0]).__name__, repr(entry[0])))
        return f"dict {len(entries)}", [part for entry in entries for part in entry]
    if isinstance(value, list | tuple):
        return f"{'list' if isinstance(value, list) else 'tuple'} {len(value)}", list(value)
    if isinstance(value, set | frozenset):
        return f"set {len(value)}", sorted(value, key=repr)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return type(value).__name__, [part for f in fields for part in (f.name, getattr(value, f.name))]
    if isinstance(value, np.ndarray) and value.dtype.hasobject:
        return f"array {value.shape}", list(value.flat)
    return None


def _leaf(value: Any) -> tuple[str, bytes]:
    """Return the kind of a value that is no container, and its content; of an unknown kind there is no content."""
    kind = type(value).__name__
    if isinstance(value, enum.Enum):
        return kind, value.name.encode()
    if isinstance(value, str | os.PathLike):
        return "str", os.fspath(value).encode("utf-8", "surrogatepass") if isinstance(value, str) else os.fsencode(
            value
        )
    if isinstance(value, bytes | bytearray):
        return "bytes", bytes(value)
    if value is None or (isinstance(value, bool | int | float | complex) and not isinstance(value, np.generic)):
        return kind, repr(value).encode()
    if isinstance(value, Tensor) and value.layout == torch.strided and not (value.is_quantized or value.is_nested):
        return f"Tensor {value.dtype} {tuple(value.shape)}", _tensor_bytes(value)
    if isinstance(value, np.ndarray | np.generic):
        return f"array {value.dtype.str} {value.shape}", value.tobytes()
    if all(hasattr(value, name) for name in ("tobytes", "mode", "size")):  # an image of PIL, which is not imported here
        return f"image {value.mode} {value.size}", value.tobytes()
    return kind, b""


def _add(digest: Any, value: Any, depth: int = 0) -> None:
    parts = _parts(value) if depth < _DEEPEST else None
    kind, content = _leaf(value) if parts is None else (parts[0], b"")
    # With their lengths, so that ("ab", "c") and ("a", "bc") differ.
    digest.update(f"{kind}|{len(content)}|".encode())
    digest.update(content)
    for part in parts[1] if parts else []:
        _add(digest, part, depth + 1)


def _digest(value: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    _add(digest, value)
    return digest.hexdigest()


def fingerprint(dataset: Any, samples: int = 64, seed: int = 0) -> Fingerprint:
    """Return what is to be remembered of a data set: its length, class, and a hash of some of its items.

    Tensors, arrays, images, text, numbers and containers of them are hashed by content, whatever else by the name of its
    type. The items are read here and now; python's, numpy's and torch's random streams are afterwards where they were (a
    generator that the data set itself holds moves on).

    A data set that augments gives another item at each reading. It is found out by reading items twice; its items are left
    out, so that only its length and class can be compared.

    Args:
        dataset: A map-style data set, with ``__len__`` and ``__getitem__``.
        samples: How many items are hashed, in the order in which they are drawn.
        seed: Seed of their choice.

    Returns:
        Fingerprint: Equal for equal data sets, also in another process.

    Raises:
        TypeError: If the data set has no length or no items.

    Example:
        >>> data = [(torch.tensor([0.5]), 0), (torch.tensor([0.7]), 1)]
        >>> fingerprint(data) == fingerprint(list(data)), fingerprint(data) == fingerprint(data[::-1])
        (True, False)
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"A fingerprint needs a map-style data set, with __len__ and __getitem__; got {type(dataset).__name__}. "
            "Scores belong to the indices of such a data set."
        )
    length = len(dataset)
    drawn = torch.randperm(length, generator=torch.Generator().manual_seed(seed))[:samples].tolist()
    with _random_streams_kept():
        # Seeded, so that every rank and every run comes to the same verdict.
        _seed_streams(seed)
        first = [_digest(dataset[i]) for i in drawn]
        _seed_streams(seed + 1)
        second = [_digest(dataset[i]) for i in drawn[:_READ_TWICE]]
    items = _digest(first) if second == first[:_READ_TWICE] else None
    return Fingerprint(length, _class_name(dataset), items, samples, seed)


@dataclass(frozen=True, eq=False)
class SampleScores:
    """Scores of the samples of one data set, higher = harder.

    Attributes:
        values: (n,) float64; nan where a sample could not be scored.
        name: Which score it is, as ``"el2n"``.
        epoch: How many epochs the model that scored had been trained; ``None`` if unknown.
        seed: Seed of that run.
        fingerprint: That of the data set; ``None`` checks nothing.
        labels: (n,) int64: the class of each sample.
        index: (n,) int64: which item of the data set each value belongs to; ``None`` if 0 to n - 1.

    Raises:
        ValueError: If the shapes do not fit, or an index comes twice or is negative.

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
            raise ValueError(
                f"SampleScores needs one value for each sample, (n,); got the shape {tuple(values.shape)}."
            )
        object.__setattr__(self, "values", values)
        for key in ("labels", "index"):
            given = getattr(self, key)
            if given is None:
                continue
            given = torch.as_tensor(given).detach().to("cpu", torch.int64)
            if given.shape != values.shape:
                raise ValueError(f"SampleScores has {len(values)} values, but {key} of shape {tuple(given.shape)}.")
            object.__setattr__(self, key, given)
        if (
            self.index is not None
            and len(values)
            and (self.index.min() < 0 or len(set(self.index.tolist())) < len(values))
        ):
            raise ValueError("SampleScores needs each index once, from 0 on.")

    def dense(self, total: int) -> Tensor:
        """Return a value for each of ``total`` items of the data set, nan for those without a score.

        Raises:
            ValueError: If a score belongs to an item beyond them.
        """
        index = torch.arange(len(self.values)) if self.index is None else self.index
        if len(index) and int(index.max()) >= total:
            raise ValueError(
                f"The scores {self.name!r} reach to item {int(index.max())}, but the data set has {total} items. "
                "They belong to another data set, or to another split of it."
            )
        return torch.full((total,), torch.nan, dtype=torch.float64).index_copy_(0, index, self.values)


def _entries(scores: SampleScores) -> dict[str, Any]:
    index = torch.arange(len(scores.values)) if scores.index is None else scores.index
    entries = {
        "format": _FORMAT,
        "scores": scores.values.numpy(),
        "index": index.numpy(),
        "name": scores.name,
        "epoch": scores.epoch,
        "seed": scores.seed,
        "labels": None if scores.labels is None else scores.labels.numpy(),
    }
    if scores.fingerprint is not None:
        entries |= {f"fingerprint_{key}": value for key, value in dataclasses.asdict(scores.fingerprint).items()}
    return {key: np.asarray(value) for key, value in entries.items() if value is not None}


def save_scores(scores: SampleScores, path: str | os.PathLike[str]) -> Path:
    """Write scores to a ``.npz`` file.

    It holds the arrays ``scores`` and ``index``, ``labels`` if there are any, and ``name``, ``epoch``, ``seed`` and the
    parts of the fingerprint; ``numpy.load`` reads it without pickle. The file appears whole or not at all.

    Args:
        scores: What to write.
        path: Where; ``.npz`` is added if it is missing.

    Returns:
        Path: The file that was written.
    """
    path = Path(path)
    path = path if path.suffix == ".npz" else path.with_name(f"{path.name}.npz")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            np.savez(file, **_entries(scores))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _from_entries(entries: Mapping[str, Any]) -> SampleScores:
    def plain(key: str) -> Any:
        return entries[key].item() if key in entries else None

    keys = [f.name for f in dataclasses.fields(Fingerprint)]
    found = Fingerprint(*(plain(f"fingerprint_{key}") for key in keys)) if "fingerprint_length" in entries else None
    values, index = torch.from_numpy(entries["scores"]), torch.from_numpy(entries["index"])
    return SampleScores(
        values,
        plain("name"),
        plain("epoch"),
        plain("seed"),
        found,
        torch.from_numpy(entries["labels"]) if "labels" in entries else None,
        None if torch.equal(index, torch.arange(len(values))) else index,
    )


def _load_npz(path: Path) -> SampleScores:
    try:
        with np.load(path, allow_pickle=False) as file:
            entries = {key: file[key] for key in file.files}
    except (ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is no score file: it should be a .npz file of save_scores, or a .csv ({error})."
        ) from error
    missing = {"format", "scores", "index", "name"} - set(entries)
    if missing:
        raise ValueError(f"{path} is no score file: it has no {', '.join(sorted(missing))}.")
    if int(entries["format"]) > _FORMAT:
        raise ValueError(f"{path} was written by a later version of lightning-grad. Update lightning-grad to read it.")
    return _from_entries(entries)


def _column(columns: Sequence[str], known: Sequence[str]) -> str | None:
    return next((column for column in columns if column.strip().lower() in known), None)


def _positions(names: Sequence[str], dataset: Any) -> Tensor | None:
    """Return the item of an ImageFolder-like data set that each file name belongs to."""
    samples = getattr(dataset, "samples", None)
    if samples is None:
        return None
    where = {os.path.basename(str(sample[0])): i for i, sample in enumerate(samples)}
    unknown = [name for name in names if os.path.basename(name) not in where]
    if unknown:
        raise ValueError(
            f"The data set has no file {unknown[0]!r} ({len(unknown)} names of the score table are unknown)."
        )
    return torch.tensor([where[os.path.basename(name)] for name in names])


def _load_csv(path: Path, dataset: Any) -> SampleScores:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        rows, columns = list(reader), list(reader.fieldnames or [])
    index, name = _column(columns, _INDEX_COLUMNS), _column(columns, _NAME_COLUMNS)
    others = [column for column in columns if column not in (index, name)]
    score = _column(others, _SCORE_COLUMNS) or (others[0] if len(others) == 1 else None)
    if score is None or not rows:
        raise ValueError(
            f"{path} should have a header, one column of scores (named 'score' if there are others) and, if wanted, "
            f"a column 'index' or 'filename'; got the columns {', '.join(map(repr, columns)) or 'none'}, {len(rows)} rows."
        )
    try:
        values = torch.tensor([float(row[score]) for row in rows], dtype=torch.float64)
        given = torch.tensor([int(row[index]) for row in rows]) if index else None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} has a row whose score or index is no number ({error}).") from error
    if given is None and name is not None:
        given = _positions([row[name] for row in rows], dataset)
    title = path.stem if score.strip().lower() in _SCORE_COLUMNS else score.strip()
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

    A ``.csv`` table needs a header and one column of scores (called ``score`` if there are further ones). A column ``index``
    says which item a row belongs to; a column ``filename`` does so for a data set with ``samples``, as torchvision's
    ``ImageFolder`` has them, by the last part of the path. Without either, rows are in the order of the data set. A table
    has no fingerprint, so only its length is checked. Higher must mean harder, as in the tables for ImageNet of
    github.com/rgeirhos/dataset-pruning-metrics, where a high score means that a sample is worth keeping.

    Args:
        path: A ``.npz`` file of :func:`save_scores`, or a ``.csv`` table.
        dataset: The data set that the scores should belong to; ``None`` checks nothing.
        strict: Whether a mismatch raises; otherwise it warns.

    Returns:
        SampleScores: What the file holds.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no score file, or its scores belong to another data set.
    """
    path = Path(path)
    scores = _load_csv(path, dataset) if path.suffix.lower() == ".csv" else _load_npz(path)
    differences = [] if dataset is None else _mismatches(scores, dataset)
    if differences:
        message = (
            f"The scores in {path} were made for another data set: {' and '.join(differences)} "
            f"{'differs' if len(differences) == 1 else 'differ'} (score file against data set). "
            "Score this data set, or use strict=False if you know that the items are the same."
        )
        if strict:
            raise ValueError(message)
        warnings.warn(message, stacklevel=2)
    return scores


def _check_alike(first: SampleScores, other: SampleScores) -> None:
    if other.name != first.name:
        raise ValueError(f"Only scores of one kind have a mean; got {first.name!r} and {other.name!r}.")
    found, there = first.fingerprint, other.fingerprint
    differences = found.differences(there) if found and there else []
    if differences:
        raise ValueError(f"Only scores of one data set have a mean; {' and '.join(differences)} differ.")
    for key in ("index", "labels", "values"):
        a, b = getattr(first, key), getattr(other, key)
        same = (a is None) == (b is None) and (
            a is None or (len(a) == len(b) if key == "values" else torch.equal(a, b))
        )
        if not same and not (key == "labels" and (a is None or b is None)):
            raise ValueError(f"Only scores of the same samples have a mean; their {key} differ.")


def average_scores(scores: Sequence[SampleScores | str | os.PathLike[str]]) -> SampleScores:
    r"""Return the mean of scores of several runs, as EL2N and GraNd want it.

    .. math::
        \bar s_i = \frac{1}{|R_i|} \sum_{r \in R_i} s_{ir}

    :math:`R_i` are the runs that could score sample i; it is nan if none could.

    Args:
        scores: At least one, or the paths of their files: the same score of the same samples.

    Returns:
        SampleScores: With the epoch and seed that all agree on, else ``None``.

    Raises:
        ValueError: If there are none, or they differ in name, data set or samples.

    Example:
        >>> runs = [SampleScores(torch.tensor(s), "el2n") for s in ([0.2, 1.0], [0.4, torch.nan])]
        >>> average_scores(runs).values
        tensor([0.3000, 1.0000], dtype=torch.float64)

    References:
        Paul et al., "Deep Learning on a Data Diet", 2021, arXiv 2107.07075, section 2: the mean over ten runs.
    """
    loaded = [item if isinstance(item, SampleScores) else load_scores(item) for item in scores]
    if not loaded:
        raise ValueError("average_scores needs at least one file of scores; got none.")
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
