"""The basis of DCT-AdamW, its choice of columns, and how close it comes to the best projection."""

import pytest
import torch
from torch import Tensor

from lightning_grad.functional import dct_basis
from lightning_grad.functional.optimizers.dct_adamw import columns_of, follow_columns, largest_columns

ROWS, SIZE, RANK = 96, 48, 8


@pytest.mark.parametrize("size", [1, 2, 7, 48])
def test_the_basis_is_orthogonal_and_its_first_column_is_constant(size: int) -> None:
    basis = dct_basis(size, torch.float64)
    assert torch.allclose(basis.mT @ basis, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(basis[:, 0], basis.new_full((size,), size**-0.5))


def test_it_is_the_transform_of_fourier_analysis() -> None:
    """The DCT-II of x is half the Fourier transform of x and its mirror image, shifted by half an entry."""
    x = torch.randn(6, dtype=torch.float64)
    mirrored = torch.fft.fft(torch.cat([x, x.flip(0)]))[:6]
    shift = torch.exp(-1j * torch.pi * torch.arange(6) / 12)
    scale = torch.full((6,), (2 / 6) ** 0.5, dtype=torch.float64).index_fill(0, torch.tensor(0), 6**-0.5)
    assert torch.allclose(x @ dct_basis(6, torch.float64), (shift * mirrored).real / 2 * scale, atol=1e-12)


def test_moments_follow_the_rotation_between_two_subspaces() -> None:
    basis = dct_basis(9, torch.float64)
    old, new, moment = torch.tensor([0, 3, 4, 7]), torch.tensor([3, 5, 7, 8]), torch.randn(6, 4, dtype=torch.float64)
    rotation = basis[:, old].mT @ basis[:, new]
    assert torch.allclose(follow_columns(moment, old, new, 9), moment @ rotation, atol=1e-12)


def test_a_mask_that_loading_turned_into_floats_names_the_same_columns() -> None:
    mask = largest_columns(torch.randn(4, 300), 40)
    assert torch.equal(columns_of(mask.to(torch.bfloat16), 40), mask.nonzero().flatten())


def smooth(noise: float) -> Tensor:
    """Return a matrix of low rank with correlated neighbors in a row, plus noise."""
    places = torch.arange(SIZE, dtype=torch.float64)
    factor = torch.linalg.cholesky(0.95 ** (places[:, None] - places).abs())
    low = torch.randn(ROWS, RANK, dtype=torch.float64) @ (torch.randn(RANK, SIZE, dtype=torch.float64) @ factor.mT)
    return low / RANK**0.5 + noise * torch.randn(ROWS, SIZE, dtype=torch.float64)


def errors(matrix: Tensor, rank: int) -> tuple[float, float, float]:
    """Return the errors of the projections by DCT, by SVD and by a random basis."""
    chosen = dct_basis(SIZE, torch.float64)[:, largest_columns(matrix @ dct_basis(SIZE, torch.float64), rank)]
    best = torch.linalg.svd(matrix)[2][:rank].mT
    drawn, _ = torch.linalg.qr(torch.randn(SIZE, rank, dtype=torch.float64))
    dct, svd, random = ((matrix - matrix @ q @ q.mT).norm().item() for q in (chosen, best, drawn))
    return dct, svd, random


def test_with_smooth_rows_it_is_close_to_the_best_projection() -> None:
    torch.manual_seed(0)
    found = [errors(smooth(noise=1.0), RANK) for _ in range(10)]
    assert all(dct <= 1.3 * svd for dct, svd, _ in found)
    assert all(dct <= random for dct, _, random in found)
    assert not all(random <= 1.3 * svd for _, svd, random in found)  # so the bound asks for something


def test_without_order_in_the_rows_it_is_still_no_worse_than_a_random_one() -> None:
    torch.manual_seed(0)
    shuffled = [smooth(noise=0.3)[:, torch.randperm(SIZE)] for _ in range(10)]
    assert all(dct <= random for dct, _, random in (errors(matrix, RANK) for matrix in shuffled))
