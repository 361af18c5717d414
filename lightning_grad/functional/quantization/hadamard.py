"""The Walsh-Hadamard transform in blocks, which spreads large entries over their neighbors."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _matrix(size: int, dtype: torch.dtype) -> Tensor:
    matrix = torch.ones(1, 1, dtype=dtype)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size)


# Constants rather than a cache, which compiled code could not read.
_MATRICES = {(size, dtype): _matrix(size, dtype) for size in (2, 4, 8, 16) for dtype in (torch.float32, torch.float64)}


def hadamard_block(size: int, largest: int = 128) -> int:
    """Return the largest power of two that divides ``size``, at most ``largest``.

    The released code of QuEST uses blocks of 128 and fails for other sizes.

    Args:
        size: Entries of a row.
        largest: Upper limit, a power of two; 128 as in QuEST.

    Example:
        >>> hadamard_block(256), hadamard_block(96), hadamard_block(27)
        (128, 32, 1)
    """
    return min(largest, size & -size)


def hadamard_transform(rows: Tensor, block: int) -> Tensor:
    r"""Multiply every block of a row by the orthonormal Hadamard matrix.

    .. math::
        y = H x, \qquad H_1 = (1), \quad
        H_{2n} = \tfrac{1}{\sqrt 2} \begin{pmatrix} H_n & H_n \\ H_n & -H_n \end{pmatrix}

    H is symmetric and orthogonal, so it is its own inverse, and its transpose too.

    Args:
        rows: Tensor of shape (..., size).
        block: Entries of a block, a power of two that divides ``size``; 1 changes nothing.

    Returns:
        Tensor: Of the same shape and dtype.

    Raises:
        ValueError: If ``block`` is not a power of two that divides the last dimension.

    Example:
        >>> hadamard_transform(torch.tensor([1.0, 1.0, 3.0, 1.0]), 2) * 2**0.5
        tensor([2.0000, 0.0000, 4.0000, 2.0000])
    """
    size = rows.shape[-1]
    if block < 1 or block & (block - 1) or size % block:
        raise ValueError(f"block must be a power of two that divides {size}; got {block}. Use hadamard_block({size}).")
    if block == 1:
        return rows
    flat = rows.reshape(-1, block)
    # On a GPU, a product of matrices may round to TF32.
    by_products = rows.is_cpu and (2, rows.dtype) in _MATRICES
    return (_by_products(flat) if by_products else _by_sums(flat)).reshape(rows.shape)


def _by_products(rows: Tensor) -> Tensor:
    """Multiply by the Kronecker product of two small matrices, one after the other: the fastest way on a CPU."""
    if torch.is_autocast_enabled("cpu"):  # which would round the products to half precision
        with torch.autocast("cpu", enabled=False):
            return _by_products(rows)
    block = rows.shape[1]
    inner = min(block, 16)
    product: Tensor = rows.reshape(-1, inner) @ _MATRICES[inner, rows.dtype]
    if inner == block:
        return product
    return _MATRICES[block // inner, rows.dtype] @ product.reshape(-1, block // inner, inner)


def _by_sums(rows: Tensor) -> Tensor:
    """Add and subtract halves of blocks (fast Walsh-Hadamard transform), which every device rounds in the same way."""
    block = rows.shape[1]
    half = block // 2
    while half:
        pairs = rows.reshape(-1, 2, half)
        first, second = pairs[:, 0], pairs[:, 1]
        rows = torch.stack([first + second, first - second], 1)
        half //= 2
    return rows / math.sqrt(block)
