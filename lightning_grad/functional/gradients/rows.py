"""Find which sample each row of a tensor belongs to, through functions that move rows.

By default, a tensor whose first dimension is k B is assumed to have k adjacent rows per sample, in order: the *shape
rule*. It holds for nearly all tensors of a network, and costs nothing. Functions that move rows break it. Their effect
is found by making the same call on a tensor of sample numbers, so no function needs its own rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_grad.functional.plain_tensors import tensors_in


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The samples of the rows of a tensor that does not follow the shape rule.

    Attributes:
        axis: The dimension of the samples.
        length: Size of that dimension.
        samples: The sample of each entry along it, (length,); ``None`` for the order of the shape rule.
        owner: The sample that the whole tensor belongs to, if there is only one.
        mixed: Whether an entry along the first dimension belongs to several samples or to none.
        covers: Whether each sample of the batch has an entry.
    """

    axis: int = 0
    length: int = 0
    samples: Tensor | None = None
    owner: int | None = None
    mixed: bool = False
    covers: bool = True

    def same_as(self, other: Rows) -> bool:
        """Return True if two descriptions are equal."""
        if (self.axis, self.length, self.owner, self.mixed) != (other.axis, other.length, other.owner, other.mixed):
            return False
        if self.samples is None or other.samples is None:
            return self.samples is other.samples
        return self.samples is other.samples or torch.equal(self.samples, other.samples.to(self.samples.device))

    def fits(self, shape: torch.Size) -> bool:
        """Return True if this can describe a tensor of the given shape."""
        return self.owner is not None or (len(shape) > self.axis and shape[self.axis] == self.length)


def in_order(length: int, samples: int, device: torch.device) -> Tensor:
    """Return the sample of each of ``length`` rows by the shape rule."""
    return torch.arange(samples, device=device).unsqueeze(1).expand(samples, length // samples).reshape(-1)


def obeys_shape_rule(shape: Sequence[int], samples: int) -> bool:
    """Return True if the first dimension is k B."""
    return len(shape) > 0 and shape[0] > 0 and shape[0] % samples == 0


# Functions by their effect on rows.


def _functions(names: str) -> Iterator[Any]:
    for name in names.split():
        yield from (getattr(home, name) for home in (torch, torch.Tensor, F) if hasattr(home, name))


_STACKS = frozenset(_functions("stack vstack hstack dstack row_stack column_stack"))
# Position and default of the argument with the dimension that a function works on.
_DIMENSIONS = {
    **dict.fromkeys(_functions("cat concat concatenate stack unbind select narrow index_select"), (1, 0)),
    **dict.fromkeys(_functions("split chunk tensor_split split_with_sizes"), (2, 0)),
    **dict.fromkeys(_functions("repeat_interleave roll"), (2, None)),
}
# Functions that sort or select by value. Their values depend on all samples, whatever rows they seem to have.
SORTS = {
    **dict.fromkeys(_functions("sort argsort"), (1, -1)),
    **dict.fromkeys(_functions("topk kthvalue"), (2, -1)),
    **dict.fromkeys(_functions("msort"), (1, 0)),
}
_ALL_DIMENSIONS = {**_DIMENSIONS, **SORTS}
# Functions that move, repeat, join or drop rows.
MOVES = frozenset([*_DIMENSIONS, *_STACKS, *_functions("__getitem__ masked_select take repeat tile flip")])
# A tensor that follows the shape rule still does after these; other rows are followed.
RESHAPES = frozenset(_functions("reshape view flatten unflatten view_as reshape_as"))
_GETTERS = frozenset(getattr(torch.Tensor, name).__get__ for name in ("T", "mT", "H", "mH"))
TRANSPOSES = _GETTERS.union(_functions("transpose swapaxes swapdims permute movedim moveaxis t adjoint"))
REDUCTIONS = frozenset(_functions("mean sum nanmean nansum var std amax amin max min prod logsumexp median mode"))
# Rows of the first factor are rows of the product; rows of the second are its columns.
PRODUCTS = frozenset(_functions("matmul mm __matmul__ bmm"))
# Summands without a graph are part of the constant.
ADDITIONS = frozenset(_functions("add add_ sub sub_ subtract rsub __rsub__ __radd__"))


def touches_rows(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return True if a call of one of ``MOVES`` or ``SORTS`` changes the first dimension."""
    if func is torch.Tensor.__getitem__:
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        # Two index tensors separated by a slice put their dimension first.
        several = sum(isinstance(i, (Tensor, list)) for i in index) > 1
        return several or not (len(index) and isinstance(index[0], slice) and index[0] == slice(None))
    position, default = _ALL_DIMENSIONS.get(func, (0, None))
    if position == 0:
        return True
    dim = kwargs.get("dim", args[position] if len(args) > position else default)
    data = args[0] if isinstance(args[0], Tensor) else next((t for t in args[0] if isinstance(t, Tensor)), None)
    width = data.dim() + (func in _STACKS) if data is not None else 0
    return not isinstance(dim, int) or not width or dim % width == 0


def moved_rows(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    samples: int,
    rows_of: Callable[[Tensor], Rows | None],
) -> list[Rows | None]:
    """Return the rows of each result of a function that moves rows; ``None`` for the shape rule.

    Args:
        func: The function.
        args: Positional arguments of the call; the first is a tensor or a list of tensors.
        kwargs: Keyword arguments of the call.
        samples: B.
        rows_of: Function that returns the known rows of a tensor.
    """
    data, rest = args[0], args[1:]
    if isinstance(data, Tensor):
        if rows_of(data) is None and not obeys_shape_rule(data.shape, samples):
            return []
    elif func in _STACKS and any(t.dim() == 0 and rows_of(t) is None for t in data):
        return []  # a list of losses with unknown owners: assume the shape rule, which the rehearsal then tests
    # Sample numbers on the CPU need no host sync. An index tensor on a GPU requires them on that GPU.
    device = next((i.device for i in tensors_in(rest) if i.dim()), torch.device("cpu"))
    count = _indexed(func, rest)
    if isinstance(data, Tensor):
        numbers: Any = _numbers(data, rows_of(data), samples, count, device)
        if func in RESHAPES:
            if any(isinstance(a, torch.dtype) for a in rest):
                return [rows_of(data)]
            # Expanded numbers cannot be viewed. A copy has the size of the activation, so use small integers.
            numbers = numbers.to(torch.int16 if samples < 2**15 else torch.int32).contiguous()
    else:
        numbers = [_numbers(t, rows_of(t), samples, None, device) for t in data]
    found = func(numbers, *rest, **kwargs)
    return [_read(n, samples) for n in (found if isinstance(found, (tuple, list)) else [found])]


def _numbers(tensor: Tensor, rows: Rows | None, samples: int, count: int | None, device: torch.device) -> Tensor:
    """Return the sample of each entry, along the first ``count`` dimensions only; -1 for no sample."""
    shape = tensor.shape[:count]
    if rows is None and obeys_shape_rule(tensor.shape, samples):
        rows = Rows(0, tensor.shape[0])
    if rows is None or rows.mixed:
        return torch.full(shape, -1, device=device)
    if rows.owner is not None:
        return torch.full(shape, rows.owner, device=device)
    ids = rows.samples if rows.samples is not None else in_order(rows.length, samples, device)
    along = [1] * tensor.dim()
    along[rows.axis] = rows.length
    whole = ids.to(device).reshape(along).expand(tensor.shape)
    # All entries along the remaining dimensions are equal: keep only the first.
    if not rows.axis < len(shape) < tensor.dim():
        return whole
    first: tuple[Any, ...] = (..., *[0] * (tensor.dim() - len(shape)))
    return whole[first]


def _read(numbers: Tensor, samples: int) -> Rows | None:
    """Return the rows of a tensor from the sample numbers that were moved in the same way."""
    if numbers.numel() == 0:
        return Rows(length=0, mixed=True) if numbers.dim() else None
    if numbers.dim() == 1 and numbers.numel() <= _FEW:
        return _read_few(numbers, samples)
    first = int(numbers.reshape(-1)[0])
    if samples > 1 and first >= 0 and bool((numbers == first).all()):
        return Rows(owner=first, covers=False)
    for axis in range(min(2, numbers.dim())):
        lines = numbers.movedim(axis, 0).reshape(numbers.shape[axis], -1)
        if bool(((lines == lines[:, :1]) & (lines >= 0)).all()):
            ids, length = lines[:, 0].to(torch.long), lines.shape[0]
            plain = length % samples == 0 and torch.equal(ids, in_order(length, samples, ids.device))
            if plain:
                return None if axis == 0 else Rows(axis, length)
            return Rows(axis, length, ids, covers=len(set(ids.tolist())) == samples)
    return Rows(length=numbers.shape[0], mixed=True) if numbers.dim() else None


def _read_few(numbers: Tensor, samples: int) -> Rows | None:
    """Return the same as :func:`_read` for a short vector, which Python handles faster than torch."""
    ids, length = numbers.tolist(), len(numbers)
    if ids[0] >= 0 and samples > 1 and ids.count(ids[0]) == length:
        return Rows(owner=ids[0], covers=False)
    if min(ids) < 0:
        return Rows(length=length, mixed=True)
    each = length // samples
    if length % samples == 0 and all(i == place // each for place, i in enumerate(ids)):
        return None
    return Rows(0, length, numbers.to(torch.long), covers=len(set(ids)) == samples)


_FEW = 512


def _indexed(func: Callable[..., Any], rest: tuple[Any, ...]) -> int | None:
    """Return how many leading dimensions an index uses; None for complicated indices."""
    if func is not torch.Tensor.__getitem__:
        return None
    index = rest[0] if isinstance(rest[0], tuple) else (rest[0],)
    if any(i is Ellipsis or i is None or isinstance(i, (list, bool)) for i in index):
        return None
    return sum(i.dim() if isinstance(i, Tensor) and i.dtype == torch.bool else 1 for i in index) or None


def transposed_rows(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], rows: Rows | None, samples: int
) -> Rows | None:
    """Return the rows of a transposed tensor.

    Samples by the shape rule move to another dimension, and back again: (B, T) and (T, B).
    """
    data = args[0]
    if rows is None:
        if not obeys_shape_rule(data.shape, samples):
            return None
        rows = _along(0, data.shape[0], True)
    if rows.owner is not None or rows.mixed:
        return rows
    if data.dim() == 2 and data.shape[0] == data.shape[1]:
        # A similarity matrix: both dimensions are samples, and a loss over rows and columns assigns each term to its
        # anchor. (T, B) with T = B by coincidence is left to the rehearsal, and to proven terms (`like`).
        return None if rows.samples is None else rows
    rest = tuple(tuple(a) if isinstance(a, list) else a for a in args[1:])
    axis = _axis_after(func, rest, tuple(kwargs.items()), data.dim(), rows.axis)
    if rows.samples is not None:
        return Rows(axis, rows.length, rows.samples, covers=rows.covers)
    return None if axis == 0 else _along(axis, rows.length, rows.covers)


@lru_cache(256)
def _along(axis: int, length: int, covers: bool) -> Rows:
    """Return rows in the order of the shape rule along a dimension, cached."""
    return Rows(axis, length, covers=covers)


@lru_cache(256)
def _axis_after(
    func: Callable[..., Any], rest: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...], width: int, axis: int
) -> int:
    """Return the new position of a dimension, found by a call on a meta tensor whose sizes are all different."""
    probe = torch.empty(tuple(range(2, 2 + width)), device="meta")
    return list(func(probe, *rest, **dict(kwargs)).shape).index(2 + axis)


def assigned_rows(args: tuple[Any, ...], samples: int, rows_of: Callable[[Tensor], Rows | None]) -> Rows | None:
    """Return the rows of a tensor after ``data[index] = value``."""
    data, index, value = args
    before = rows_of(data)
    if not isinstance(value, Tensor) or not value.requires_grad:
        return before
    is_row = rows_of(value) is not None or obeys_shape_rule(value.shape, samples)
    if not is_row or not (before is not None or obeys_shape_rule(data.shape, samples)):
        return before
    device = next((i.device for i in tensors_in((index,)) if i.dim()), torch.device("cpu"))
    numbers = _numbers(data, before, samples, None, device).clone()
    numbers[index] = _numbers(value, rows_of(value), samples, None, device)
    return _read(numbers, samples)


def reduces_samples(args: tuple[Any, ...], kwargs: dict[str, Any], axis: int) -> bool:
    """Return True if a reduction over given dimensions includes the dimension of the samples."""
    dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
    width = args[0].dim() if args and isinstance(args[0], Tensor) else 0
    dims = dims if isinstance(dims, (tuple, list)) else (dims,)
    return any(isinstance(d, int) and not isinstance(d, bool) and width > 0 and d % width == axis for d in dims)
