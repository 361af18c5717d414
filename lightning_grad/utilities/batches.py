"""Find the input in a batch of any form, and replace it without changing the batch.

A batch may be a tensor, or any nesting of tuples, named tuples, lists, mappings, dataclasses and objects with tensors
as attributes. A place in it is given by a path of keys, positions and attribute names.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_grad.functional.plain_tensors import dressed, plain_tensor
from lightning_grad.utilities.batch_copies import DEEPEST, children, put, shallow_copy

Path = tuple[Any, ...]


class _Every:
    def __repr__(self) -> str:
        return "*"


EVERY = _Every()
_NO_INPUT = re.compile(r"labels?|targets?|y|(.*_)?mask|(sample_)?weights?", re.IGNORECASE)


def find_input(batch: Any, key: str | int | None, needed_by: str) -> Path | None:
    """Return the path of the input of a batch.

    Args:
        batch: The batch.
        key: A key, a position, or several joined by dots, such as ``"images"`` or ``"0.pixels"``.
            Default: the first tensor of numbers with at least two dimensions, if it is floating-point. Parts named
            ``label``, ``target``, ``y``, ``mask``, ``..._mask``, ``weight`` or ``sample_weight`` are skipped.
        needed_by: Name of the technique for error messages.

    Returns:
        tuple | None: The path. ``None`` if no key is given and there is no such tensor, or an integer tensor comes
        first.

    Raises:
        ValueError: If the key is not in the batch, or its value is not a floating-point tensor.

    Example:
        >>> batch = {"ids": torch.zeros(4, dtype=torch.long), "pixels": torch.zeros(4, 3)}
        >>> find_input(batch, None, "doctest"), find_input([batch], "0.pixels", "doctest")
        (('pixels',), (0, 'pixels'))
    """
    if key is not None:
        named, found = follow(batch, key, needed_by)
        if EVERY in named or not isinstance(found, Tensor) or not found.is_floating_point():
            kind = f"a tensor of {found.dtype}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise ValueError(
                f"{needed_by}: input_key={key!r} must name a floating-point tensor of the batch, but names {kind}. "
                f"{_way_in(batch)}"
            )
        return named
    path, value = first_numbers(batch)
    return path if value is not None and value.is_floating_point() else None


def _way_in(batch: Any) -> str:
    """Return the advice of an error about a wrong key: the key of the input."""
    path, value = first_numbers(batch)
    if not path or value is None or not value.is_floating_point():
        return "Omit input_key."
    key = path[0] if len(path) == 1 else ".".join(map(str, path))
    return f"Set input_key={key!r}, or omit it."


def first_numbers(batch: Any) -> tuple[Path, Tensor] | tuple[None, None]:
    """Return the path and value of the first real tensor with two or more dimensions, except labels and masks.

    Example:
        >>> batch = {"labels": torch.zeros(4, 2), "mask": torch.zeros(4, 3), "ids": torch.zeros(4, 3, dtype=torch.long)}
        >>> first_numbers(batch)[0]
        ('ids',)
    """
    found = list(_numbers_of(batch))
    # An empty tensor stands for a missing part; an empty one of integers does not mean that the input is text.
    full = [each for each in found if each[1].numel()]
    floating = [each for each in found if each[1].is_floating_point()]
    return next(iter(full or floating), (None, None))


def text_of(path: Path) -> str:
    """Format a path as Python code.

    Example:
        >>> text_of((0, "x"))
        "batch[0]['x']"
    """
    return "batch" + "".join(f"[{key!r}]" for key in path)


def input_at(batch: Any, path: Path) -> Tensor:
    """Return the tensor at a path.

    Raises:
        ValueError: If there is no tensor at the path.

    Example:
        >>> input_at([{"x": torch.ones(2)}], (0, "x"))
        tensor([1., 1.])
    """
    found = part_at(batch, path)
    if not isinstance(found, Tensor):
        raise ValueError(f"There is no tensor at {text_of(path)}: it is a {type(found).__name__}.")
    return found


def part_at(batch: Any, path: Path) -> Any:
    """Return the part of a batch at a path.

    Raises:
        ValueError: If the path does not exist.
    """
    for depth in range(len(path)):
        batch = _child_at(batch, path, depth)
    return batch


def with_input(batch: Any, path: Path, value: Tensor) -> Any:
    """Return a batch with another tensor at a path; it shares all other parts with the original batch.

    Raises:
        ValueError: If the path does not exist.

    Example:
        >>> batch = [torch.zeros(1), torch.ones(1)]
        >>> with_input(batch, (0,), torch.full((1,), 5.0)), batch
        ([tensor([5.]), tensor([1.])], [tensor([0.]), tensor([1.])])
    """
    return _with_child(batch, path, value, 0)


def _with_child(batch: Any, path: Path, value: Tensor, depth: int) -> Any:
    if depth == len(path):
        return value
    key = path[depth]
    child = _with_child(_child_at(batch, path, depth), path, value, depth + 1)
    if isinstance(batch, tuple):
        items = [child if position == key else item for position, item in enumerate(batch)]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    other = shallow_copy(batch)
    put(other, key, child)
    return other


def map_tensors(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to every tensor of a batch and return the new batch.

    Example:
        >>> map_tensors({"x": torch.zeros(1), "n": 3}, lambda tensor: tensor + 1)
        {'x': tensor([1.]), 'n': 3}
    """
    for path, value in list(_tensors_of(batch)):
        batch = with_input(batch, path, function(value))
    return batch


def tensors_in(batch: Any) -> list[Tensor]:
    """Return all tensors of a batch, in order.

    Example:
        >>> tensors_in({"x": (torch.zeros(1), 3), "y": torch.ones(1)})
        [tensor([0.]), tensor([1.])]
    """
    return [value for _, value in _tensors_of(batch)]


def form_of(batch: Any) -> dict[str, str]:
    """Return what each tensor of a batch is, by its place: its kind of numbers, and its number of dimensions.

    Example:
        >>> form_of({"x": torch.zeros(4, 3), "y": (torch.zeros(4, dtype=torch.long), "text")})
        {"batch['x']": 'a 2-dimensional floating-point tensor', "batch['y'][0]": 'a 1-dimensional integer tensor'}
    """
    return {
        text_of(path): f"a {value.dim()}-dimensional {_kind_of(value)} tensor" for path, value in _tensors_of(batch)
    }


def _kind_of(value: Tensor) -> str:
    if value.dtype == torch.bool:
        return "boolean"
    return "complex" if value.is_complex() else "floating-point" if value.is_floating_point() else "integer"


def same_tensors(batch: Any, other: Any) -> bool:
    """Return True if two batches contain the same tensor objects, even in different containers.

    Example:
        >>> x = torch.ones(2)
        >>> same_tensors((x, 3), (x, 3)), same_tensors((x, 3), (x.clone(), 3))
        (True, False)
    """
    ours, theirs = tensors_in(batch), tensors_in(other)
    return len(ours) == len(theirs) and all(one is another for one, another in zip(ours, theirs, strict=True))


def _tensors_of(batch: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    if isinstance(batch, Tensor):
        yield path, batch
        return
    for key, child in children(batch) if len(path) < DEEPEST else ():
        yield from _tensors_of(child, (*path, key))


def _numbers_of(batch: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    if isinstance(batch, Tensor):
        if batch.dim() >= 2 and batch.dtype != torch.bool and not batch.is_complex():
            yield path, batch
        return
    fields = getattr(batch, "_fields", None) if isinstance(batch, tuple) else None
    for key, child in children(batch) if len(path) < DEEPEST else ():
        name = fields[key] if fields else key
        if not (isinstance(name, str) and _NO_INPUT.fullmatch(name)):
            yield from _numbers_of(child, (*path, key))


def _child_at(part: Any, path: Path, depth: int) -> Any:
    """Return the child of a part, where the part is at the first ``depth`` keys of a path."""
    key = path[depth]
    try:
        return part[key] if isinstance(part, (Mapping, list, tuple)) else getattr(part, key)
    except (LookupError, TypeError, AttributeError):
        raise ValueError(
            f"There is no {text_of(path)}: {text_of(path[:depth])}, a {type(part).__name__}, has no {key!r}."
        ) from None


def follow(batch: Any, key: str | int, needed_by: str) -> tuple[Path, Any]:
    """Return the path of a key, and the part there; ``*`` means all items of a list or values of a mapping.

    Args:
        batch: The batch.
        key: The key that the user has set: a key, a position, or several joined by dots.
        needed_by: Name of the technique for error messages.

    Raises:
        ValueError: If the key is not in the batch.

    Example:
        >>> follow([{"x": 1}, {"x": 2}], "*.x", "doctest")
        ((*, 'x'), 1)
    """
    path: Path = ()
    here = batch
    is_whole = isinstance(key, int) or (isinstance(batch, Mapping) and key in batch)  # a mapping's key may contain dots
    for part in [key] if is_whole else str(key).split("."):
        known = dict(children(here))
        place = int(part) if part not in known and isinstance(part, str) and part.isdecimal() else part
        by_attribute = None if place in known else _path_of_attribute(here, part)
        if place in known:
            path, here = (*path, place), known[place]
        elif part == "*" and known:
            path, here = (*path, EVERY), next(iter(known.values()))
        elif by_attribute is not None:
            path, here = (*path, *by_attribute), getattr(here, str(part))
        else:
            found = (
                f"available there: {', '.join(map(repr, known))}"
                if known
                else f"type {type(here).__name__} has no parts"
            )
            raise ValueError(f"{needed_by}: input_key={key!r} is not in the batch; {found}. {_way_in(batch)}")
    return path, here


def _path_of_attribute(here: Any, name: str | int) -> Path | None:
    """Return the path of a tensor that an object exposes under a name, such as graphs that keep tensors in a store."""
    if not isinstance(name, str) or isinstance(here, Tensor):
        return None
    shown = getattr(here, name, None)
    return next((path for path, value in _tensors_of(here) if value is shown), None)


def reordered(batch: Any, order: Tensor, samples: int | None = None) -> Any:
    """Return a batch with reordered samples: the rows of tensors, and the entries of lists.

    Only tensors and lists with the length ``samples`` are reordered, by default the length of the order.

    Example:
        >>> reordered([torch.tensor([1, 2, 3]), "a"], torch.tensor([1]), samples=3)
        [tensor([2]), 'a']
        >>> reordered({"x": torch.tensor([1, 2, 3]), "name": ["a", "b", "c"], "n": 7}, torch.tensor([2, 0, 1]))
        {'x': tensor([3, 1, 2]), 'name': ['c', 'a', 'b'], 'n': 7}
    """
    length = len(order) if samples is None else samples
    if isinstance(batch, Tensor):
        rows = plain_tensor(batch)
        return dressed(rows[order.to(rows.device)], batch) if rows.dim() and len(rows) == length else batch
    holds_rows = any(value.dim() and len(value) == length for _, value in _tensors_of(batch))
    if type(batch) in (list, tuple) and len(batch) == length and not holds_rows:
        return type(batch)(batch[place] for place in order.tolist())
    for key, child in list(children(batch)):
        other = reordered(child, order, samples)
        if other is not child:
            batch = with_input(batch, (key,), other)
    return batch
