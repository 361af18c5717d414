"""Send numbers as bytes: 8-bit integers with one scale per block of entries."""

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 1024  # entries that share a scale
_LARGEST = 127.0


def int8_bytes(numel: int) -> int:
    """Return the size of a message of :func:`pack_int8` in bytes: one per entry, and four per block.

    Example:
        >>> int8_bytes(3000)
        3012
    """
    return numel + 4 * _blocks(numel)


def pack_int8(values: Tensor) -> Tensor:
    r"""Round a vector to 8-bit integers, block by block, and pack them with the scales into one byte buffer.

    .. math::
        q_i = \operatorname{round}(x_i / s_b), \qquad s_b = \tfrac{1}{127} \max_{i \in b} |x_i|

    Rounding is deterministic. Its error is at most half a scale; a sender that adds the error to its next message loses
    nothing. A block with a value that is not finite is NaN on the receiver.

    Args:
        values: (n,), float32 or float64.

    Returns:
        Tensor: uint8, (:func:`int8_bytes`,): scales, then integers.

    Example:
        >>> unpack_int8(pack_int8(torch.tensor([1.27, 0.5, -0.012])), 3)
        tensor([ 1.2700,  0.5000, -0.0100])
    """
    rows = pad(values, (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    scales = rows.abs().amax(1) / _LARGEST
    integers = (rows / torch.where(scales > 0, scales, 1.0).unsqueeze(1)).round_()
    # A cast of NaN to an integer has no defined value; the scale carries it.
    integers = integers.nan_to_num_(0.0, 0.0, 0.0).clamp_(-_LARGEST, _LARGEST)  # a subnormal scale is inexact
    scales = torch.where(scales.isfinite(), scales, torch.nan).float()
    packed = integers.to(torch.int8).view(-1)[: values.numel()]
    return torch.cat([scales.view(torch.uint8), packed.view(torch.uint8)])


def unpack_int8(message: Tensor, numel: int) -> Tensor:
    """Return the values of a buffer that :func:`pack_int8` wrote, as float32.

    Args:
        message: uint8, (:func:`int8_bytes`,).
        numel: Number of values.

    Returns:
        Tensor: (numel,).
    """
    end = 4 * _blocks(numel)
    scales, integers = message[:end].clone().view(torch.float32), message[end:].view(torch.int8).float()
    return (pad(integers, (0, -numel % BLOCK)).view(-1, BLOCK) * scales.unsqueeze(1)).view(-1)[:numel]


def _blocks(numel: int) -> int:
    return -(-numel // BLOCK)
