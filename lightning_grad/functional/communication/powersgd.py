"""The mathematics of PowerSGD: approximate a matrix by a product of two thin ones, with one power iteration."""

import math

import torch
from torch import Tensor

from lightning_grad.functional.shuffling import hashed_seed


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
