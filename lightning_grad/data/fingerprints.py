"""Fingerprints of data sets: length, class, and a hash of some of the items.

They detect that the training data changed, because it was regenerated during a fit or replaced before a resume.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_grad.data.random_streams import generators_kept, random_streams_kept, seed_streams
from lightning_grad.functional.plain_tensors import plain_tensor

_FEW = 16  # hashed items of training data, which may be slow to read; score files use more
_RELOADED = (
    "Create the samples once in setup, or with a fixed seed, to keep them the same, or set "
    "reload_dataloaders_every_n_epochs=0 to load them once."
)
_RESUMED = (
    "Resume with the data of that run. To train on the new data, give {who} another name=: it then starts without the "
    "scores and selections of the checkpoint."
)
_READ_TWICE = 8  # items read twice to detect augmentation
_DEEPEST = 16
_UNREADABLE = (RuntimeError, TypeError, NotImplementedError)  # raised by tensors without storage of their own


class ListItems:
    """Single items of a data set that maps a list of indices to a batch (``DataLoader(batch_size=None)``).

    Args:
        dataset: The data set.

    Example:
        >>> import torch
        >>> ListItems(torch.arange(5) * 2)[3]
        tensor([6])
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[[index]]


@dataclass(frozen=True)
class Fingerprint:
    """The fingerprint of a data set.

    Attributes:
        length: Number of items.
        class_name: Name of its class; for a ``Subset`` also the class of the underlying data set.
        items: Hash of the sampled items; ``None`` if reading an item twice gives different results.
        samples: Number of items to sample.
        seed: Seed of the sampling.
    """

    length: int
    class_name: str
    items: str | None
    samples: int = 64
    seed: int = 0

    def differences(self, other: Fingerprint) -> list[str]:
        """Describe the differences to another fingerprint; an empty list if it may be the same data set.

        Equal items in data sets of different classes count as equal data. If items cannot be compared (one data set
        augments, or the sampling differs), the class names must be equal.

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
                found.append("the items (other content, order, or transform)")
        elif self.class_name != other.class_name:
            found.append(f"the class ({self.class_name} against {other.class_name})")
        return found


def _class_name(dataset: Any) -> str:
    if isinstance(dataset, ListItems):
        return _class_name(dataset.dataset)
    name = type(dataset).__name__
    return f"{name}[{_class_name(dataset.dataset)}]" if isinstance(dataset, torch.utils.data.Subset) else name


def _pieces(tensor: Tensor) -> Sequence[Any] | None:
    """Return the parts of a quantized or sparse tensor, or None for a dense tensor."""
    if tensor.is_quantized:
        return tensor.dequantize(), str(tensor.qscheme())
    if tensor.is_mkldnn:
        return (tensor.to_dense(),)
    if tensor.layout == torch.strided:
        return None
    entries = tensor.to_sparse().coalesce()
    return entries.indices(), entries.values()


def _on_cpu(tensor: Tensor) -> Tensor:
    """Return a detached, plain ``torch.Tensor`` on the CPU."""
    tensor = tensor.detach()
    plain = tensor.as_subclass(Tensor) if type(tensor) is not Tensor else tensor
    return plain if plain.is_meta else plain.cpu()


def _tensor_bytes(tensor: Tensor) -> bytes:
    # A tensor of one element may have any stride, which contiguous() keeps; clone() normalizes it.
    plain = tensor.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format).reshape(-1)
    return plain.view(torch.uint8).numpy().tobytes()


def _tensor_taken_apart(tensor: Tensor) -> tuple[str, bytes, Sequence[Any]]:
    """Return the kind, bytes and parts of a tensor; unreadable tensors have only a kind."""
    if tensor.is_nested:
        return f"Tensor nested {tensor.dtype}", b"", tensor.detach().unbind()
    kind = f"Tensor {tensor.dtype} {tuple(tensor.shape)}"
    try:
        plain = _on_cpu(tensor)
        pieces = _pieces(plain)
        if pieces is not None:
            return f"{kind} {tensor.layout}", b"", pieces
        return kind, b"" if plain.is_meta else _tensor_bytes(plain), ()
    except _UNREADABLE:
        return kind, b"", ()


def _taken_apart(value: Any) -> tuple[str, bytes, Sequence[Any]]:
    """Return the kind of a value, its bytes, and its parts; both are empty for an unknown kind."""
    kind = type(value).__name__
    if isinstance(value, Tensor):
        return _tensor_taken_apart(plain_tensor(value))
    if isinstance(value, Mapping):
        entries = sorted(value.items(), key=lambda entry: (type(entry[0]).__name__, repr(entry[0])))
        return f"dict {len(entries)}", b"", [part for entry in entries for part in entry]
    if isinstance(value, list | tuple):
        return f"{'list' if isinstance(value, list) else 'tuple'} {len(value)}", b"", value
    if isinstance(value, set | frozenset):
        return f"set {len(value)}", b"", sorted(value, key=repr)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return kind, b"", [part for f in dataclasses.fields(value) for part in (f.name, getattr(value, f.name))]
    if isinstance(value, np.ndarray) and value.dtype.hasobject:
        return f"array {value.shape}", b"", list(value.flat)
    return *_leaf(value, kind), ()


def _leaf(value: Any, kind: str) -> tuple[str, bytes]:
    """Return the kind and bytes of a value without parts."""
    if isinstance(value, enum.Enum):
        return kind, value.name.encode()
    if isinstance(value, str):
        return "str", value.encode("utf-8", "surrogatepass")
    if isinstance(value, os.PathLike):
        return "str", os.fsencode(value)
    if isinstance(value, bytes | bytearray):
        return "bytes", bytes(value)
    if value is None or (isinstance(value, bool | int | float | complex) and not isinstance(value, np.generic)):
        return kind, repr(value).encode()
    if isinstance(value, np.ndarray | np.generic):
        return f"array {value.dtype.str} {value.shape}", value.tobytes()
    if all(hasattr(value, name) for name in ("tobytes", "mode", "size")):  # a PIL image; PIL is not imported
        return f"image {value.mode} {value.size}", value.tobytes()
    return kind, b""


def _add(digest: Any, value: Any, depth: int = 0) -> None:
    kind, content, parts = _taken_apart(value)
    # The lengths distinguish ("ab", "c") from ("a", "bc").
    digest.update(f"{kind}|{len(content)}|".encode())
    digest.update(content)
    for part in parts if depth < _DEEPEST else ():
        _add(digest, part, depth + 1)


def _digest(value: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    _add(digest, value)
    return digest.hexdigest()


def fingerprint(dataset: Any, samples: int = 64, seed: int = 0) -> Fingerprint:
    """Compute the fingerprint of a data set: its length, class, and a hash of some of its items.

    Tensors, arrays, images, strings, numbers and containers of these are hashed by content, all other objects by the
    name of their type. Afterwards the random states of Python, numpy, torch and of generators inside the data set are
    restored.

    Some items are read twice. If they differ, the data set augments them: the fingerprint then contains no hash, and
    only length and class can be compared.

    Args:
        dataset: A map-style data set, with ``__len__`` and ``__getitem__``.
        samples: Number of randomly drawn items to hash.
        seed: Seed of the draw.

    Returns:
        Fingerprint: Equal for equal data sets, also in another process.

    Raises:
        TypeError: If the data set has no ``__len__`` or no ``__getitem__``.

    Example:
        >>> data = [(torch.tensor([0.5]), 0), (torch.tensor([0.7]), 1)]
        >>> fingerprint(data) == fingerprint(list(data)), fingerprint(data) == fingerprint(data[::-1])
        (True, False)
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"A fingerprint needs a map-style data set, with __len__ and __getitem__; got {type(dataset).__name__}. "
            "Wrap the samples in one: scores belong to its indices."
        )
    length = len(dataset)
    drawn = torch.randperm(length, generator=torch.Generator().manual_seed(seed))[:samples].tolist()
    with random_streams_kept(), generators_kept(dataset):
        # Seeded, so that every rank and every run agrees on whether the data set augments.
        seed_streams(seed)
        first = [_digest(dataset[i]) for i in drawn]
        seed_streams(seed + 1)
        second = [_digest(dataset[i]) for i in drawn[:_READ_TWICE]]
    items = _digest(first) if second == first[:_READ_TWICE] else None
    return Fingerprint(length, _class_name(dataset), items, samples, seed)


def mark_of(dataset: Any) -> Fingerprint:
    """Return the fingerprint of a data set; only length and class if its items cannot be read in this process.

    Random states and the data set are unchanged. Items are read from a copy: a data set that opens files at the first
    access does not open them here, where workers started later would share them.
    """
    try:
        return fingerprint(_copied(dataset), _FEW)
    except Exception:  # raised by the user's data set, which may be readable only in workers
        return dataclasses.replace(fingerprint(dataset, samples=0), items=None)


def _copied(dataset: Any) -> Any:
    try:
        other = copy.copy(dataset)
        inner = vars(other).get("dataset") if hasattr(other, "__dict__") else None
        if hasattr(inner, "__getitem__") and hasattr(inner, "__len__"):
            other.dataset = _copied(inner)
    except Exception:  # some data sets cannot be copied
        return dataset
    return other


def resume_advice(needed_by: str) -> str:
    """Return the advice of an error about a checkpoint with other training data."""
    return _RESUMED.format(who=needed_by.partition("[")[0])


def refuse_other_data(known: Fingerprint, dataset: Any, needed_by: str, reloaded: bool) -> Fingerprint:
    """Raise if a data set differs from a known fingerprint.

    Args:
        known: The known fingerprint.
        dataset: The current training data.
        needed_by: Name of the technique for error messages.
        reloaded: True if the data was reloaded in this fit, False if the run resumes.

    Returns:
        Fingerprint: The fingerprint of the data set.

    Raises:
        ValueError: If they differ.
    """
    found = mark_of(dataset)
    differences = known.differences(found)
    if differences:
        name = type(dataset.dataset if isinstance(dataset, ListItems) else dataset).__name__
        when, before, advice = "in this run", "in the run of the checkpoint", resume_advice(needed_by)
        if reloaded:
            when, before, advice = "loaded again", "at the start of the fit", _RELOADED
        raise ValueError(
            f"{needed_by} identifies samples by index, but the training set {name}, {when}, has other samples than "
            f"{before}. Different: {' and '.join(differences)}. {advice}"
        )
    return found
