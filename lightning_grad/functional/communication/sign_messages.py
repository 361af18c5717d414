"""Pack the signs of tensors into bytes, one bit an entry, with one scale for each part of a tensor."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import embedding, pad

_SCALE_BYTES = 4
_GATHER_BITS = 0x0102040810204080  # moves the lowest bits of eight bytes into the highest byte


def part_numel(numel: int, ranks: int) -> int:
    r"""Return the entries of the part of a tensor that one rank averages, a multiple of eight.

    .. math::
        p = 8 \left\lceil \frac{n}{8 N} \right\rceil

    Args:
        numel: Entries of the tensor, :math:`n`.
        ranks: Number of ranks, :math:`N`.

    Example:
        >>> part_numel(100, 2), part_numel(100, 1)
        (56, 104)
    """
    return 8 * -(-numel // (8 * ranks))


def sign_bytes(numel: int, ranks: int) -> int:
    r"""Return the bytes that a rank sends to the others for one tensor: its signs, and the average of its own part.

    .. math::
        B = N \left(\frac{p}{8} + 4\right)

    Each of the :math:`N - 1` other ranks gets one part of :math:`p` entries, and the average of the own part goes to all.

    Args:
        numel: Entries of the tensor.
        ranks: Number of ranks, :math:`N`.

    Example:
        >>> sign_bytes(1_000_000, 2), 4 * 1_000_000
        (125008, 4000000)
    """
    return ranks * (part_numel(numel, ranks) // 8 + _SCALE_BYTES)


def split_parts(flat: Tensor, ranks: int) -> Tensor:
    """Return a flat tensor as one row for each rank, (ranks, :func:`part_numel`), padded with zeros.

    Args:
        flat: (n).
        ranks: Number of ranks.

    Example:
        >>> split_parts(torch.ones(10), 2).sum(1)
        tensor([8., 2.])
    """
    part = part_numel(flat.numel(), ranks)
    return pad(flat, (0, ranks * part - flat.numel())).view(ranks, part)


def pack_signs(parts: Sequence[Tensor], counts: Sequence[Tensor]) -> Tensor:
    r"""Write the signs of several tensors into bytes, each row of a tensor with its mean magnitude.

    .. math::
        s = \frac{1}{n} \sum_i |x_i|, \qquad b_i = [x_i \ge 0]

    The values :math:`\pm s` that :func:`unpack_signs` returns have the smallest squared error of all values with these signs
    and one magnitude.

    Args:
        parts: Tensors of (rows, a multiple of eight), float; padding is zero.
        counts: Entries of each row that are not padding, (rows) for each tensor.

    Returns:
        Tensor: uint8, (rows, bytes): for each row first the scales of all tensors as float32, then the signs.

    Example:
        >>> message = pack_signs([torch.tensor([[1.0, -3, 2, 0, 0, 0, 0, 0]])], [torch.tensor([4])])
        >>> message.shape, unpack_signs(message, [8])[0][0, :4].tolist()
        (torch.Size([1, 5]), [1.5, -1.5, 1.5, 1.5])

    References:
        - Karimireddy et al. (2019), Error Feedback Fixes SignSGD and other Gradient Compression Schemes, arXiv 1901.09847,
          section 4: the scaled sign.
    """
    sums = torch.stack([part.abs().sum(1) for part in parts], 1)
    scales = (sums / torch.stack(list(counts), 1).clamp(min=1)).to(torch.float32)
    return torch.cat([scales.view(torch.uint8), *map(_as_bits, parts)], 1)


def _as_bits(part: Tensor) -> Tensor:
    # A product collects the bits of eight bytes in one pass; shifting each bit into place takes eight.
    eight = (part >= 0).view(torch.int64)
    return (eight.mul_(_GATHER_BITS) >> 56).to(torch.uint8)


def unpack_signs(message: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Return the values that a message of :func:`pack_signs` encodes.

    Args:
        message: uint8, (rows, bytes).
        sizes: Length of the rows of each tensor, multiples of eight.

    Returns:
        list: float32 tensors of (rows, size).

    Example:
        >>> message = pack_signs([torch.tensor([[2.0, -2, 2, 2, -2, 2, 2, 2]])], [torch.tensor([8])])
        >>> unpack_signs(message, [8])[0].tolist()
        [[2.0, -2.0, 2.0, 2.0, -2.0, 2.0, 2.0, 2.0]]
    """
    rows, begin = len(message), _SCALE_BYTES * len(sizes)
    scales = message[:, :begin].clone(memory_format=torch.contiguous_format).view(torch.float32)
    bits = torch.split(message[:, begin:], [size // 8 for size in sizes], 1)
    signs = _signs_of_bytes(message.device)
    found = []
    for place, (size, packed) in enumerate(zip(sizes, bits, strict=True)):
        values = embedding(packed.to(torch.int32), signs).view(rows, size)
        found.append(values.mul_(scales[:, place, None]))
    return found


def _signs_of_bytes(device: torch.device) -> Tensor:
    """Return the eight signs that each byte encodes, (256, 8), in the order of :func:`_as_bits`."""
    byte, place = torch.arange(256, device=device), torch.arange(8, device=device)
    return ((byte[:, None] >> place) & 1).to(torch.float32).mul_(2.0).sub_(1.0)
