"""Thin factors: their sizes, their first numbers, and a basis that never breaks."""

import pytest
import torch
from torch import Tensor

from lightning_grad.functional import initial_factor, orthonormalize
from lightning_grad.functional.communication.powersgd import (
    batched,
    low_rank_numel,
    matrix_shape,
    subtract_product_,
    thin_product,
    write_product_,
)

SHAPES = [(4, 3), (64, 3, 5, 5), (10, 1), (1, 10), (5, 2, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_tensor_is_a_matrix_of_its_first_dimension(shape: tuple[int, ...]) -> None:
    assert matrix_shape(shape) == tuple(torch.zeros(shape).flatten(1).shape)
    assert matrix_shape(torch.Size(shape)) == matrix_shape(shape)


@pytest.mark.parametrize("rank", [1, 2, 100])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_numbers_sent_are_those_of_both_factors(shape: tuple[int, ...], rank: int) -> None:
    matrix = torch.randn(shape).flatten(1)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    kept = min(rank, len(s))
    assert low_rank_numel(shape, rank) == u[:, :kept].numel() + v[:kept].numel()


def test_first_factors_are_the_same_for_everyone_and_differ_by_name_and_seed() -> None:
    first = initial_factor(50, 3, 0, "net.0.weight")
    state = torch.random.get_rng_state()
    assert torch.equal(first, initial_factor(50, 3, 0, "net.0.weight"))
    assert torch.equal(state, torch.random.get_rng_state()), "nobody else's numbers are drawn"
    assert first.shape == (50, 3)
    assert first.dtype == torch.float32
    for other in (initial_factor(50, 3, 1, "net.0.weight"), initial_factor(50, 3, 0, "net.2.weight")):
        assert (first - other).abs().min() > 0
    torch.manual_seed(0)
    assert not torch.equal(first, torch.randn(50, 3))
    assert abs(initial_factor(10_000, 4, 0, "w").std().item() - 1.0) < 0.02


def spanned(basis: Tensor) -> Tensor:
    return basis @ basis.t()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(20, 4), (4, 4), (7, 1)], ids=str)
def test_a_basis_is_orthonormal_and_spans_the_columns(shape: tuple[int, int], dtype: torch.dtype) -> None:
    factor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    basis = orthonormalize(factor)
    assert basis.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}.get(dtype, 2e-2)
    basis, factor = basis.double(), factor.double()
    torch.testing.assert_close(basis.t() @ basis, torch.eye(shape[1]).double(), rtol=0, atol=tolerance)
    torch.testing.assert_close(spanned(basis) @ factor, factor, rtol=0, atol=10 * tolerance)


@pytest.mark.parametrize(
    "factor",
    [
        torch.zeros(6, 3),
        torch.ones(6, 3),
        torch.eye(6, 3) * 1e-30,
        torch.eye(6, 3) * 1e30,
        torch.eye(6, 3)[:, [0, 0, 1]],
    ],
    ids=["zero", "equal columns", "tiny", "huge", "twice the same"],
)
def test_columns_that_depend_give_a_basis_and_no_nan(factor: Tensor) -> None:
    basis = orthonormalize(factor)
    torch.testing.assert_close(basis.t() @ basis, torch.eye(3), rtol=0, atol=1e-5)


def test_several_matrices_at_once() -> None:
    factors = torch.randn(5, 20, 3, generator=torch.Generator().manual_seed(0))
    for factor, basis in zip(factors, orthonormalize(factors), strict=True):
        torch.testing.assert_close(spanned(basis), spanned(orthonormalize(factor)))


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (300, 700), (5, 70_000), (70_000, 3)])
@pytest.mark.parametrize("rank", [1, 4])
def test_products_are_those_of_torch(shape: tuple[int, int], rank: int) -> None:
    """Of a matrix and its transpose, in pieces and whole."""
    matrix, left, right = (torch.randn(s).double() for s in (shape, (shape[0], rank), (shape[1], rank)))
    torch.testing.assert_close(thin_product(matrix, right), matrix @ right)
    torch.testing.assert_close(thin_product(matrix.t(), left), matrix.t() @ left)
    torch.testing.assert_close(subtract_product_(matrix.clone(), left, right), matrix - left @ right.t())
    torch.testing.assert_close(
        write_product_(matrix.clone(), left, right, torch.tensor(2.0).double()), left @ right.t() + 2
    )


def test_a_nan_in_place_of_the_scalar_reaches_all_entries() -> None:
    assert (
        write_product_(torch.ones(3, 4), torch.ones(3, 1), torch.ones(4, 1), torch.tensor(float("nan"))).isnan().all()
    )


def test_a_few_steps_of_the_power_method_find_the_best_approximation() -> None:
    """What the strategy does with a gradient that stays: its product nears that of the singular vectors."""
    generator = torch.Generator().manual_seed(0)
    left, right = (orthonormalize(torch.randn(n, 6, generator=generator)) for n in (30, 20))
    matrix = left @ torch.diag(torch.tensor([10.0, 8.0, 1.0, 0.5, 0.2, 0.1])) @ right.t()
    best = left[:, :2] @ torch.diag(torch.tensor([10.0, 8.0])) @ right[:, :2].t()
    factor = initial_factor(20, 2, 0, "w")
    for _ in range(8):
        basis = orthonormalize(matrix @ factor)
        factor = matrix.t() @ basis
    torch.testing.assert_close(basis @ factor.t(), best, rtol=0, atol=1e-4)


def test_small_matrices_of_equal_shape_share_a_call() -> None:
    shapes = [(6, 4), (300, 300), (5, 4), (6, 4), (300, 300), (6, 4)]
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(shape, generator=generator).double() for shape in shapes]
    matrices[3] = matrices[3].float()
    factors = [torch.randn(m.shape[1], 2, generator=generator).to(m.dtype) for m in matrices]
    given: list[torch.Size] = []

    def noting(matrix: Tensor, factor: Tensor) -> Tensor:
        given.append(matrix.shape)
        return thin_product(matrix, factor)

    found = batched(noting, matrices, factors)
    assert given == [(2, 6, 4), (300, 300), (5, 4), (6, 4), (300, 300)], "large ones and another dtype stand alone"
    torch.testing.assert_close(found, [m @ f for m, f in zip(matrices, factors, strict=True)])
    for basis, factor in zip(batched(orthonormalize, found), found, strict=True):
        assert torch.equal(basis, orthonormalize(factor))
