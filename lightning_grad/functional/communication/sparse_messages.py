"""Pack pairs of index and value into one byte buffer for a collective."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

_INDEX_BYTES = 4
_ALIGNMENT = 4


def pairs_bytes(counts: Sequence[int], value_dtype: torch.dtype = torch.float32) -> int:
    r"""Return the size of a message of index-value pairs in bytes.

    .. math::
        B = 4 \left\lceil \tfrac{1}{4} \, (4 + b) \textstyle\sum_i k_i \right\rceil

    where :math:`k_i` is the number of pairs of tensor :math:`i` and :math:`b` the bytes of a value: 8 bytes per pair in
    float32 and 6 in float16, padded to whole words.

    Args:
        counts: Number of pairs of each tensor.
        value_dtype: Dtype of the values.

    Returns:
        int: Size in bytes.

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

    Indices come first because they are four-byte words, which an odd number of float16 values before them would
    misalign. If a tensor has fewer pairs than its count, the rest is filled with value 0 at index 0, so that all ranks
    send messages of equal size.

    Args:
        indices: Indices of each tensor, (at most its count), below 2**31.
        values: Values of each tensor, same lengths, of ``value_dtype``.
        counts: Number of pairs reserved for each tensor.
        value_dtype: Dtype of the values.

    Returns:
        Tensor: uint8, (:func:`pairs_bytes`,).

    Example:
        >>> pack_pairs([torch.tensor([7])], [torch.tensor([1.0])], [2]).tolist()
        [7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 128, 63, 0, 0, 0, 0]
    """
    total = sum(counts)
    message = torch.zeros(pairs_bytes(counts, value_dtype), dtype=torch.uint8, device=values[0].device)
    all_indices, all_values = _views(message, total, value_dtype)
    all_indices.copy_(torch.cat([_filled(index, count) for index, count in zip(indices, counts, strict=True)]))
    all_values.copy_(torch.cat([_filled(value, count) for value, count in zip(values, counts, strict=True)]))
    return message


def _filled(part: Tensor, count: int) -> Tensor:
    return part if len(part) == count else pad(part, (0, count - len(part)))


def unpack_pairs(
    message: Tensor, counts: Sequence[int], value_dtype: torch.dtype = torch.float32
) -> list[tuple[Tensor, Tensor]]:
    """Return the pairs of each tensor from a buffer written by :func:`pack_pairs`.

    Args:
        message: uint8, (:func:`pairs_bytes`,).
        counts: Number of pairs of each tensor.
        value_dtype: Dtype of the values.

    Returns:
        list: Pairs (indices, values), one per tensor; indices are int32, and both are views of the buffer.

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
    """Add values to the entries at given indices, in place.

    Args:
        target: Flat, (n).
        indices: (k), distinct except for padding with value 0.
        values: (k), any floating dtype.
        factor: Factor of the values.

    Returns:
        Tensor: ``target``.

    Example:
        >>> add_pairs_(torch.zeros(3), torch.tensor([2, 0]), torch.tensor([4.0, 0.0]), factor=0.5)
        tensor([0., 0., 2.])
    """
    return target.index_add_(0, indices, values.to(target.dtype), alpha=factor)
