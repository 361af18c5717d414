"""Find all input tensors of a batch: a single one, or one per sample if the batch is not stacked.

Detection networks, and others whose samples differ in size, take a list of tensors or a list of samples. A pattern
gives the places of these tensors: a path with ``EVERY`` (printed as ``*``) for the positions of a list.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from lightning_grad.utilities.batch_copies import children, has_parts
from lightning_grad.utilities.batches import EVERY, Path, find_input, follow, input_at, part_at, text_of


def find_inputs(batch: Any, key: str | int | None, needed_by: str) -> Path | None:
    """Return the pattern of the inputs of a batch.

    Args:
        batch: The batch.
        key: As in :func:`find_input`; ``*`` means all items of a list or values of a mapping.
            The key of a list of floating-point tensors means all of them. Default: the tensor that :func:`find_input`
            finds, and the tensors of the other samples if it belongs to a single sample.
        needed_by: Name of the technique for error messages.

    Returns:
        tuple | None: The pattern; ``None`` as in :func:`find_input`.

    Raises:
        ValueError: If the key is not in the batch, or its tensors are not floating-point, of one dtype and of equal
            numbers of dimensions.

    Example:
        >>> import torch
        >>> images = [torch.zeros(3, 8, 8), torch.zeros(3, 8, 6)]
        >>> find_inputs((images, [{"boxes": torch.zeros(5, 4)}] * 2), None, "doctest")
        (0, *)
        >>> find_inputs([images, torch.zeros(3)], None, "doctest"), find_inputs([images, torch.zeros(3)], "0.*", "doctest")
        ((0, 0), (0, *))
    """
    if key is None:
        path = find_input(batch, None, needed_by)
        return None if path is None else _over_samples(batch, path)
    pattern, found = follow(batch, key, needed_by)
    is_list = isinstance(found, (list, tuple)) and not hasattr(found, "_fields") and len(found) > 0
    if EVERY not in pattern:
        if not is_list or not all(isinstance(each, Tensor) and each.is_floating_point() for each in found):
            return find_input(batch, key, needed_by)
        pattern = (*pattern, EVERY)
    if not has_inputs(batch, pattern):
        raise ValueError(
            f"{needed_by}: input_key={key!r} must name floating-point tensors of one dtype and number of dimensions; "
            f"the tensors at {text_of(pattern)} differ. Select one of them."
        )
    return pattern


def expanded(batch: Any, pattern: Path) -> list[Path]:
    """Return the paths of a pattern in a batch.

    Raises:
        ValueError: If the path of the pattern does not exist.

    Example:
        >>> import torch
        >>> expanded([[torch.ones(1), torch.ones(1)], 3], (0, EVERY))
        [(0, 0), (0, 1)]
    """
    if EVERY not in pattern:
        return [pattern]
    where = pattern.index(EVERY)
    holder = part_at(batch, pattern[:where])
    keys = [key for key, _ in children(holder)] if isinstance(holder, (list, tuple, Mapping)) else []
    rest = pattern[where + 1 :]
    return [(*pattern[:where], key, *path) for key in keys for path in expanded(part_at(holder, (key,)), rest)]


def has_inputs(batch: Any, pattern: Path) -> bool:
    """Return True if a pattern matches floating-point tensors of one dtype, device and number of dimensions.

    Example:
        >>> import torch
        >>> has_inputs([[torch.ones(1)]], (0, EVERY)), has_inputs([[]], (0, EVERY)), has_inputs([None], (0,))
        (True, False, False)
    """
    try:
        found = [input_at(batch, path) for path in expanded(batch, pattern)]
    except ValueError:
        return False
    kinds = {(each.dim(), each.dtype, each.device) for each in found}
    return len(kinds) == 1 and found[0].is_floating_point()


def are_samples(batch: Any, pattern: Path) -> bool:
    """Return True if each tensor of a pattern is one sample rather than a batch.

    Example:
        >>> import torch
        >>> images = [torch.zeros(3, 8, 8)] * 2
        >>> are_samples((images, ["cat", "dog"]), (0, EVERY)), are_samples((images, torch.zeros(3)), (0, EVERY))
        (True, False)
    """
    if EVERY not in pattern:
        return False
    where = pattern.index(EVERY)
    first = expanded(batch, pattern)[0]
    return EVERY not in pattern[where + 1 :] and _is_list_of_samples(batch, first, where)


def neighbours(batch: Any, pattern: Path) -> Path | None:
    """Return the pattern of all similar tensors in the same list as an input; None if there are no others.

    Example:
        >>> import torch
        >>> neighbours(([torch.zeros(4, 3), torch.zeros(4, 3)], torch.zeros(4)), (0, 0))
        (0, *)
    """
    for where in range(len(pattern)):
        wider = (*pattern[:where], EVERY, *pattern[where + 1 :])
        holder = part_at(batch, pattern[:where])
        several = isinstance(holder, (list, tuple)) and len(holder) > 1
        # If the whole batch is two tensors, the second is the target.
        least = 1 if where or len(pattern) > 1 else 2
        if several and EVERY not in pattern and has_inputs(batch, wider) and len(expanded(batch, wider)) > least:
            return wider
    return None


def _over_samples(batch: Any, path: Path) -> Path:
    for where in range(len(path)):
        pattern = (*path[:where], EVERY, *path[where + 1 :])
        if _is_list_of_samples(batch, path, where) and has_inputs(batch, pattern):
            return pattern
    return path


def _is_list_of_samples(batch: Any, path: Path, where: int) -> bool:
    """Return True if the container at ``path[:where]`` is a list with one sample per item.

    A list of samples and a list of batches (two views, two loaders) look alike. The parts next to the input distinguish
    them: a batch comes with tensors of equal length, a sample with numbers, strings and tensors of other lengths.
    """
    holder, rest = part_at(batch, path[:where]), path[where + 1 :]
    if not isinstance(holder, (list, tuple)) or hasattr(holder, "_fields"):
        return False
    try:
        lengths = [_length(input_at(item, rest)) for item in holder]
    except ValueError:
        return False
    if rest:
        others = [[leaf for each in _siblings(item, rest) for leaf in _leaves(each)] for item in holder]
        if all(any(_length(leaf) == own for leaf in each) for own, each in zip(lengths, others, strict=True)):
            return False
        foreign = (_length(leaf) != own for own, each in zip(lengths, others, strict=True) for leaf in each)
        return len(holder) > 1 and any(foreign)
    siblings = list(_siblings(batch, path[:where]))
    # Three images with three channels and three labels are ambiguous: a batch of images would have one more dimension.
    are_images = set(lengths) == {len(holder)} and input_at(batch, path).dim() == 3
    if not are_images and any(_is_batch_of(each, lengths) for each in siblings):
        return False
    return any(_size(each) == len(holder) for each in siblings)


def _siblings(batch: Any, path: Path) -> Iterator[Any]:
    """Yield the parts next to a path, at each of its levels."""
    for depth in range(len(path)):
        yield from (child for key, child in children(part_at(batch, path[:depth])) if key != path[depth])


def _leaves(value: Any, depth: int = 4) -> Iterator[Any]:
    if isinstance(value, Tensor) or depth == 0 or not has_parts(value):
        yield value
        return
    for _, child in children(value):
        yield from _leaves(child, depth - 1)


def _length(leaf: Any) -> int | None:
    return leaf.size(0) if isinstance(leaf, Tensor) and leaf.dim() else None


def _size(value: Any) -> int | None:
    return len(value) if isinstance(value, (list, tuple)) else _length(value)


def _is_batch_of(value: Any, lengths: list[int | None]) -> bool:
    found = [length for length in map(_length, _leaves(value)) if length is not None]
    return bool(found) and set(found) == set(lengths)
