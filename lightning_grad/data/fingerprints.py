"""What is remembered of a data set, to know it again: its length, its class, and a hash of some of its items.

So it is noticed that the training data is not what it was: made again in mid-fit, or another one when a run resumes.
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

_FEW = 16  # items of the training data, which may be slow to read; score files, which travel further, have more
_RELOADED = (
    "Make the samples once, in setup or with a fixed seed, so that they stay the same, or set "
    "reload_dataloaders_every_n_epochs=0, which loads them once."
)
_RESUMED = (
    "Resume with the data of that run. To train on these, give {who} another name=: then it begins without the "
    "checkpoint's scores and choices."
)
_READ_TWICE = 8  # items, to find out whether the data set augments
_DEEPEST = 16
_UNREADABLE = (RuntimeError, TypeError, NotImplementedError)  # raised by tensors that hold no numbers of their own


class ListItems:
    """The items of a data set that takes a list of indices and returns a batch (``DataLoader(batch_size=None)``), one by one.

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
    if isinstance(dataset, ListItems):
        return _class_name(dataset.dataset)
    name = type(dataset).__name__
    return f"{name}[{_class_name(dataset.dataset)}]" if isinstance(dataset, torch.utils.data.Subset) else name


def _pieces(tensor: Tensor) -> Sequence[Any] | None:
    """Return what a tensor is made of that is not a plain block of numbers, or None if it is one."""
    if tensor.is_quantized:
        return tensor.dequantize(), str(tensor.qscheme())
    if tensor.is_mkldnn:
        return (tensor.to_dense(),)
    if tensor.layout == torch.strided:
        return None
    entries = tensor.to_sparse().coalesce()
    return entries.indices(), entries.values()


def _on_cpu(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU, without its graph, and of no class that has a say in how it is read."""
    tensor = tensor.detach()
    plain = tensor.as_subclass(Tensor) if type(tensor) is not Tensor else tensor
    return plain if plain.is_meta else plain.cpu()


def _tensor_bytes(tensor: Tensor) -> bytes:
    # One element may have any stride, and contiguous() leaves it as it is: a copy has none.
    plain = tensor.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format).reshape(-1)
    return plain.view(torch.uint8).numpy().tobytes()


def _tensor_taken_apart(tensor: Tensor) -> tuple[str, bytes, Sequence[Any]]:
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
    """Return the kind of a value, its own content, and what it holds; of an unknown kind there is neither."""
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
    if all(hasattr(value, name) for name in ("tobytes", "mode", "size")):  # an image of PIL, which is not imported here
        return f"image {value.mode} {value.size}", value.tobytes()
    return kind, b""


def _add(digest: Any, value: Any, depth: int = 0) -> None:
    kind, content, parts = _taken_apart(value)
    # With their lengths, so that ("ab", "c") and ("a", "bc") differ.
    digest.update(f"{kind}|{len(content)}|".encode())
    digest.update(content)
    for part in parts if depth < _DEEPEST else ():
        _add(digest, part, depth + 1)


def _digest(value: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    _add(digest, value)
    return digest.hexdigest()


def fingerprint(dataset: Any, samples: int = 64, seed: int = 0) -> Fingerprint:
    """Return what is to be remembered of a data set: its length, class, and a hash of some of its items.

    Tensors, arrays, images, text, numbers and containers of them are hashed by content, whatever else by the name of its
    type. The items are read here and now; python's, numpy's and torch's random streams are afterwards where they were, and
    so are generators that the data set itself holds.

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
            "Scores belong to the indices of such a data set. Wrap the samples in one."
        )
    length = len(dataset)
    drawn = torch.randperm(length, generator=torch.Generator().manual_seed(seed))[:samples].tolist()
    with random_streams_kept(), generators_kept(dataset):
        # Seeded, so that every rank and every run comes to the same verdict.
        seed_streams(seed)
        first = [_digest(dataset[i]) for i in drawn]
        seed_streams(seed + 1)
        second = [_digest(dataset[i]) for i in drawn[:_READ_TWICE]]
    items = _digest(first) if second == first[:_READ_TWICE] else None
    return Fingerprint(length, _class_name(dataset), items, samples, seed)


def mark_of(dataset: Any) -> Fingerprint:
    """Return the fingerprint of a data set; of one whose items cannot be read here, its length and class.

    Random streams and the data set are left as they are: files that it opens when it is first read are opened by a copy, so
    that workers started later do not share them.
    """
    try:
        return fingerprint(_copied(dataset), _FEW)
    except Exception:  # of the user's data set, which may be made to be read by workers only
        return dataclasses.replace(fingerprint(dataset, samples=0), items=None)


def _copied(dataset: Any) -> Any:
    try:
        other = copy.copy(dataset)
        inner = vars(other).get("dataset") if hasattr(other, "__dict__") else None
        if hasattr(inner, "__getitem__") and hasattr(inner, "__len__"):
            other.dataset = _copied(inner)
    except Exception:  # some can only be made once
        return dataset
    return other


def resume_advice(needed_by: str) -> str:
    """Return what to do about a checkpoint that knows other samples, for an error."""
    return _RESUMED.format(who=needed_by.partition("[")[0])


def refuse_other_data(known: Fingerprint, dataset: Any, needed_by: str, reloaded: bool) -> Fingerprint:
    """Raise unless a data set may be the one that is known.

    Args:
        known: The fingerprint of that.
        dataset: What is trained on now.
        needed_by: Who asks, for errors.
        reloaded: Whether it was loaded again in this fit, or else for a run that resumes.

    Returns:
        Fingerprint: Of the data set.

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
            f"{needed_by} knows samples by their index, and the training set {name}, {when}, holds other samples than "
            f"{before}. Not the same: {' and '.join(differences)}. {advice}"
        )
    return found
