"""Finding all tensors of a batch that are its input: one, or one of each sample where a batch is not stacked.

Networks for detection, and others whose samples differ in size, get a list of tensors, or a list of samples. Where they are is
told by a pattern: a path with ``EVERY`` (printed as ``*``) in place of the positions of a list.
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
        key: As for :func:`find_input`; ``*`` stands for every item of a list (or value of a mapping), and a key that leads to
            a list of floating tensors means all of them. Default: the first tensor that :func:`find_input` would take, and
            those of the other samples if it is one sample's.
        needed_by: Who asks, for errors.

    Returns:
        tuple | None: The pattern; ``None`` as by :func:`find_input`.

    Raises:
        ValueError: If the key leads nowhere, or to something else, or to tensors of several types or numbers of dimensions.

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
            f"{needed_by}: input_key={key!r} must name floating tensors of one type with as many dimensions each; "
            f"{text_of(pattern)} are not. Name one of them."
        )
    return pattern


def expanded(batch: Any, pattern: Path) -> list[Path]:
    """Return the paths of a pattern in a batch.

    Raises:
        ValueError: If the batch has no such list.

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
    """Return whether there are floating tensors at a pattern, alike in type and number of dimensions.

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
    """Return whether each tensor of a pattern is one sample, rather than a batch of them.

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
    """Return the pattern of all tensors like an input that stand in one list with it, if only it is taken.

    Example:
        >>> import torch
        >>> neighbours(([torch.zeros(4, 3), torch.zeros(4, 3)], torch.zeros(4)), (0, 0))
        (0, *)
    """
    for where in range(len(pattern)):
        wider = (*pattern[:where], EVERY, *pattern[where + 1 :])
        holder = part_at(batch, pattern[:where])
        several = isinstance(holder, (list, tuple)) and len(holder) > 1
        # Of two tensors that are the whole batch the second is the target.
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
    """Return whether the container in which ``path[where]`` leads on holds one sample in each place.

    A list of samples and a list of batches (two views, two loaders) look alike. What stands with an input tells them apart:
    with a batch stand tensors that are as long, with a sample stand numbers, text and tensors of other lengths.
    """
    holder, rest = part_at(batch, path[:where]), path[where + 1 :]
    if not isinstance(holder, (list, tuple)) or hasattr(holder, "_fields"):
        return False
    try:
        lengths = [_length(input_at(item, rest)) for item in holder]
    except ValueError:
        return False
    if rest:
        others = [[leaf for each in _beside(item, rest) for leaf in _leaves(each)] for item in holder]
        if all(any(_length(leaf) == own for leaf in each) for own, each in zip(lengths, others, strict=True)):
            return False
        foreign = (_length(leaf) != own for own, each in zip(lengths, others, strict=True) for leaf in each)
        return len(holder) > 1 and any(foreign)
    beside = list(_beside(batch, path[:where]))
    # Three images of three channels with three labels: a batch of images would have a dimension more.
    are_images = set(lengths) == {len(holder)} and input_at(batch, path).dim() == 3
    if not are_images and any(_is_batch_of(each, lengths) for each in beside):
        return False
    return any(_size(each) == len(holder) for each in beside)


def _beside(batch: Any, path: Path) -> Iterator[Any]:
    """Return what stands beside a path, at each of its levels."""
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
