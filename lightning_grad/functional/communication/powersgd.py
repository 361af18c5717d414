"""A matrix as the product of two thin ones, by one step of the power method: the maths of PowerSGD."""

import math

import torch
from torch import Tensor

from lightning_grad.functional.shuffling import hashed_seed


def matrix_shape(shape: torch.Size | tuple[int, ...]) -> tuple[int, int]:
    """Return the rows and columns of a tensor seen as a matrix: its first dimension, and all others.

    Example:
        >>> matrix_shape((64, 3, 5, 5))
        (64, 75)
    """
    return shape[0], math.prod(shape[1:])


def low_rank_numel(shape: torch.Size | tuple[int, ...], rank: int) -> int:
    r"""Return how many numbers the two factors of a matrix have, :math:`r (n + m)` with :math:`r \le \min(n, m)`.

    Example:
        >>> low_rank_numel((64, 75), 4), low_rank_numel((64, 2), 4)
        (556, 132)
    """
    rows, columns = matrix_shape(shape)
    return min(rank, rows, columns) * (rows + columns)


def initial_factor(columns: int, rank: int, seed: int, name: str) -> Tensor:
    """Return the first right factor: normal numbers, the same on every rank.

    Args:
        columns: Columns of the matrix.
        rank: Columns of the factor.
        seed: Of the run.
        name: Of the parameter; each has its own numbers.

    Returns:
        Tensor: float32, (columns, rank), on the CPU.
    """
    return torch.randn(columns, rank, generator=torch.Generator().manual_seed(hashed_seed(seed, f"low rank/{name}")))


def orthonormalize(factor: Tensor) -> Tensor:
    r"""Return an orthonormal basis of a thin matrix's columns, by QR.

    Zero columns give some orthonormal ones, never NaN.

    Args:
        factor: (..., n, r) with r at most n, floating; half types are worked out in float32.

    Returns:
        Tensor: Same shape and type.

    Example:
        >>> orthonormalize(torch.tensor([[3.0], [4.0]])).abs()
        tensor([[0.6000],
                [0.8000]])
    """
    precise = factor.float() if factor.dtype in (torch.float16, torch.bfloat16) else factor
    basis: Tensor = torch.linalg.qr(precise).Q
    return basis.to(factor.dtype)
