"""The mathematics of PowerSGD: approximate a matrix by a product of two thin ones, with one power iteration."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_grad.functional.shuffling import hashed_seed

_PIECE = 1 << 16  # entries of a matrix that stay in the cache while a product is added


def matrix_shape(shape: torch.Size | tuple[int, ...]) -> tuple[int, int]:
    """Return the rows and columns of a tensor viewed as a matrix: its first dimension, and all others.

    Example:
        >>> matrix_shape((64, 3, 5, 5))
        (64, 75)
    """
    return shape[0], math.prod(shape[1:])


def low_rank_numel(shape: torch.Size | tuple[int, ...], rank: int) -> int:
    r"""Return the number of entries of both factors, :math:`r (n + m)` with :math:`r \le \min(n, m)`.

    Example:
        >>> low_rank_numel((64, 75), 4), low_rank_numel((64, 2), 4)
        (556, 132)
    """
    rows, columns = matrix_shape(shape)
    return min(rank, rows, columns) * (rows + columns)


def initial_factor(columns: int, rank: int, seed: int, name: str) -> Tensor:
    """Return the initial right factor: standard normal numbers, identical on all ranks.

    Args:
        columns: Number of columns of the matrix.
        rank: Number of columns of the factor.
        seed: Seed of the run.
        name: Name of the parameter; each parameter gets different numbers.

    Returns:
        Tensor: float32, (columns, rank), on the CPU.
    """
    return torch.randn(columns, rank, generator=torch.Generator().manual_seed(hashed_seed(seed, f"low rank/{name}")))


def orthonormalize(factor: Tensor) -> Tensor:
    r"""Return an orthonormal basis of the columns of a thin matrix, by QR decomposition.

    Zero columns become arbitrary orthonormal ones, never NaN.

    Args:
        factor: (..., n, r) with r at most n, floating; half precision is computed in float32.

    Returns:
        Tensor: Same shape and dtype.

    Example:
        >>> orthonormalize(torch.tensor([[3.0], [4.0]])).abs()
        tensor([[0.6000],
                [0.8000]])
    """
    precise = factor.float() if factor.dtype in (torch.float16, torch.bfloat16) else factor
    basis: Tensor = torch.linalg.qr(precise).Q
    return basis.to(factor.dtype)


def thin_product(matrix: Tensor, factor: Tensor) -> Tensor:
    r"""Return the product of a matrix and a thin factor, computed with the rows of the transposed factor.

    .. math::
        M Q = (Q^\top M^\top)^\top

    On a CPU, the product as written takes 4 to 20 times as long as reading the matrix if the factor has few columns;
    this one takes 1 to 3 times as long. Results are equal up to rounding.

    Args:
        matrix: (..., n, m), contiguous or transposed.
        factor: (..., m, r), any strides.

    Returns:
        Tensor: (..., n, r), transposed in memory.

    Example:
        >>> thin_product(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0], [10.0]]))
        tensor([[21.],
                [43.]])
    """
    return (factor.mT.contiguous() @ matrix.mT).mT


def subtract_product_(matrix: Tensor, left: Tensor, right: Tensor) -> Tensor:
    r"""Subtract :math:`P Q^\top` from a matrix in place.

    Args:
        matrix: (n, m), changed in place.
        left: P, (n, r).
        right: Q, (m, r).

    Returns:
        Tensor: ``matrix``.

    Example:
        >>> subtract_product_(torch.ones(2, 2), torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [0.0]]))
        tensor([[ 0.,  1.],
                [-1.,  1.]])
    """
    for rows, part in _pieces(matrix, left):
        rows.addmm_(part, right.t(), alpha=-1)
    return matrix


def write_product_(matrix: Tensor, left: Tensor, right: Tensor, plus: Tensor) -> Tensor:
    r"""Overwrite a matrix with :math:`P Q^\top` plus a scalar.

    Args:
        matrix: (n, m), changed in place.
        left: P, (n, r).
        right: Q, (m, r).
        plus: 0-dimensional, added to all entries.

    Returns:
        Tensor: ``matrix``.

    Example:
        >>> write_product_(torch.ones(1, 2), torch.tensor([[2.0]]), torch.tensor([[3.0], [4.0]]), torch.tensor(0.5))
        tensor([[6.5000, 8.5000]])
    """
    for rows, part in _pieces(matrix, left):
        torch.addmm(plus, part, right.t(), out=rows)
    return matrix


def _pieces(matrix: Tensor, left: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    """Return rows of a matrix and of the left factor, few enough to stay in the cache of a CPU."""
    if matrix.numel() <= _PIECE or not matrix.is_cpu:
        return [(matrix, left)]
    rows = max(1, _PIECE // matrix.shape[1])
    return zip(torch.split(matrix, rows), torch.split(left, rows), strict=True)


def batched(function: Callable[..., Tensor], *arguments: Sequence[Tensor]) -> list[Tensor]:
    """Map a function over lists of matrices, with one call for all small matrices of equal shape.

    Args:
        function: Accepts matrices, (..., n, m), and returns one.
        arguments: Lists of equal length, one for each argument of the function.

    Returns:
        list: The results, one for each place of the lists.

    Example:
        >>> batched(torch.matmul, [torch.ones(1, 2), torch.ones(1, 3)], [torch.ones(2, 1), torch.ones(3, 1)])
        [tensor([[2.]]), tensor([[3.]])]
    """
    groups: dict[Any, list[int]] = {}
    for place, given in enumerate(zip(*arguments, strict=True)):
        small = max(one.numel() for one in given) <= _PIECE
        key = tuple((one.shape, one.dtype, one.device) for one in given) if small else place
        groups.setdefault(key, []).append(place)
    results: dict[int, Tensor] = {}
    for places in groups.values():
        if len(places) == 1:
            results[places[0]] = function(*(list_[places[0]] for list_ in arguments))
        else:
            stacks = [torch.stack([list_[place] for place in places]) for list_ in arguments]
            results |= zip(places, function(*stacks), strict=True)
    return [results[place] for place in range(len(results))]
