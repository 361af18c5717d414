"""Pairs of index and value in one buffer of bytes, as a collective sends them."""

from collections.abc import Sequence

import torch
from torch import Tensor

_INDEX_BYTES = 4
_ALIGNMENT = 4


def pairs_bytes(counts: Sequence[int], value_dtype: torch.dtype = torch.float32) -> int:
    r"""Return the size of a message of pairs.

    .. math::
        B = 4 \left\lceil \tfrac{1}{4} \, (4 + b) \textstyle\sum_i k_i \right\rceil

    With :math:`k_i` the pairs of tensor :math:`i` and :math:`b` the bytes of a value: 8 bytes a pair in float32 and 6 in
    float16, padded to whole words.

    Args:
        counts: Pairs of each tensor.
        value_dtype: Type of the values.

    Returns:
        int: Bytes.

    Example:
        >>> pairs_bytes([10, 5]), pairs_bytes([10, 5], torch.float16)
        (120, 92)
    """
    size = sum(counts) * (_INDEX_BYTES + value_dtype.itemsize)
    return size + -size % _ALIGNMENT


def pack_pairs(
    indices: Sequence[Tensor], values: Sequence[Tensor], counts: Sequence[int], value_dtype: torch.dtype = torch.float32
) -> Tensor:
    """Write the pairs of several tensors into one buffer: all indices, then all values.

    Indices stand first, as they are words of four bytes, and an odd number of float16 values before them would misalign them.
    A tensor with fewer pairs than its count is filled up with zeros at index 0, so that all ranks send the same size.

    Args:
        indices: Of each tensor, (at most its count), below 2**31.
        values: Of each tensor, same lengths, of ``value_dtype``.
        counts: Pairs that each tensor gets in the buffer.
        value_dtype: Type of the values.

    Returns:
        Tensor: uint8, (:func:`pairs_bytes`).

    Example:
        >>> pack_pairs([torch.tensor([7])], [torch.tensor([1.0])], [2]).tolist()
        [7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 128, 63, 0, 0, 0, 0]
    """
    total = sum(counts)
    message = torch.zeros(pairs_bytes(counts, value_dtype), dtype=torch.uint8, device=values[0].device)
    all_indices, all_values = _views(message, total, value_dtype)
    start = 0
    for index, value, count in zip(indices, values, counts, strict=True):
        all_indices[start : start + len(index)] = index
        all_values[start : start + len(value)] = value
        start += count
    return message


def unpack_pairs(
    message: Tensor, counts: Sequence[int], value_dtype: torch.dtype = torch.float32
) -> list[tuple[Tensor, Tensor]]:
    """Return the pairs of each tensor from a buffer that :func:`pack_pairs` wrote.

    Args:
        message: uint8, (:func:`pairs_bytes`).
        counts: Pairs of each tensor.
        value_dtype: Type of the values.

    Returns:
        list: Of each tensor its indices, int32, and its values; views of the buffer.

    Example:
        >>> unpack_pairs(pack_pairs([torch.tensor([7])], [torch.tensor([1.0])], [1]), [1])
        [(tensor([7], dtype=torch.int32), tensor([1.]))]
    """
    indices, values = _views(message, sum(counts), value_dtype)
    return list(zip(torch.split(indices, list(counts)), torch.split(values, list(counts)), strict=True))


def _views(message: Tensor, total: int, value_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    end = _INDEX_BYTES * total
    return message[:end].view(torch.int32), message[end : end + value_dtype.itemsize * total].view(value_dtype)


def add_pairs_(target: Tensor, indices: Tensor, values: Tensor, factor: float = 1.0) -> Tensor:
    """Add the values of pairs to the entries that they name, in place.

    Args:
        target: Flat, (n).
        indices: (k), each once, but for fillings of value 0.
        values: (k), in any floating type.
        factor: What they are multiplied by first.

    Returns:
        Tensor: ``target``.

    Example:
        >>> add_pairs_(torch.zeros(3), torch.tensor([2, 0]), torch.tensor([4.0, 0.0]), factor=0.5)
        tensor([0., 0., 2.])
    """
    return target.index_add_(0, indices, values.to(target.dtype), alpha=factor)
