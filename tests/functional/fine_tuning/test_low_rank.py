"""Ranks by one threshold, and low-rank factors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_grad.functional import global_ranks, low_rank_factors, uniform_ranks


def spectra(seed: int = 0) -> list[Tensor]:
    """Return singular values of random matrices, some of which are nearly of low rank."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for place, (rows, columns) in enumerate([(64, 64), (64, 256), (10, 64), (32, 32)]):
        matrix = torch.randn(rows, columns, generator=generator)
        steep = torch.linspace(1.0, 0.01, rows) ** (3 * place)
        found.append(torch.linalg.svdvals(steep[:, None] * matrix))
    return found


def by_bisection(values: list[Tensor], reduction: float) -> list[int]:
    """Return the ranks at the threshold that a bisection finds."""
    normalized = [(each - each.min()) / (each.max() - each.min()) for each in (v.double() for v in values)]
    total, low, high = sum(map(len, values)), 0.0, 1.0
    for _ in range(60):
        k = (low + high) / 2
        kept = sum(int((each >= k).sum()) for each in normalized)
        low, high = (k, high) if kept > (1 - reduction) * total else (low, k)
    return [int((each >= high).sum()) for each in normalized]


@pytest.mark.parametrize("reduction", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_ranks_are_those_of_a_bisection_of_the_threshold(reduction: float) -> None:
    values = spectra()
    ranks, other = global_ranks(values, reduction), by_bisection(values, reduction)
    assert max(abs(a - b) for a, b in zip(ranks, other, strict=True)) <= 1
    total = sum(map(len, values))
    assert abs(1 - sum(ranks) / total - reduction) <= 0.01
    assert sum(ranks) == total - round(reduction * total)
    assert len(set(ranks)) > 1


def test_steep_spectra_lose_more_than_even_ones_and_scales_do_not_matter() -> None:
    values = spectra()
    shares = [rank / len(each) for rank, each in zip(global_ranks(values, 0.5), values, strict=True)]
    assert shares[3] < shares[1] < shares[0]
    scaled = [each * 10.0**place for place, each in enumerate(values)]
    assert global_ranks(scaled, 0.5) == global_ranks(values, 0.5)


def test_extremes_keep_at_least_one_and_an_even_spectrum() -> None:
    values = spectra()
    assert global_ranks(values, 0.0) == [len(each) for each in values]
    assert min(global_ranks(values, 0.999)) == 1
    assert global_ranks([torch.ones(4), torch.tensor([4.0, 0.3, 0.2, 0.1])], 0.3) == [4, 2]
    assert global_ranks([torch.zeros(3), torch.tensor([1.0])], 0.5) == [1, 1]
    assert global_ranks([], 0.5) == []
    for wrong in (1.0, -0.1):
        with pytest.raises(ValueError, match="at least 0 and below 1"):
            global_ranks(values, wrong)
        with pytest.raises(ValueError, match="at least 0 and below 1"):
            uniform_ranks([3], wrong)
    with pytest.raises(ValueError, match="finite"):
        global_ranks([torch.tensor([1.0, float("nan")])], 0.5)


@pytest.mark.parametrize("reduction", [0.1, 0.5, 0.6, 0.7])
def test_uniform_ranks_have_the_same_total_as_those_of_the_threshold(reduction: float) -> None:
    values = spectra()
    sizes = [len(each) for each in values]
    ranks = uniform_ranks(sizes, reduction)
    assert sum(ranks) == sum(global_ranks(values, reduction))
    assert all(abs(rank - (1 - reduction) * size) <= 1 for rank, size in zip(ranks, sizes, strict=True))


def test_factors_are_the_best_approximation() -> None:
    weight = torch.randn(12, 20, dtype=torch.float64)
    values = torch.linalg.svdvals(weight)
    for rank in (1, 5, 12):
        u, v = low_rank_factors(weight, rank)
        assert (u.shape, v.shape) == ((12, rank), (rank, 20))
        error = torch.linalg.matrix_norm(weight - u @ v)
        torch.testing.assert_close(error, values[rank:].square().sum().sqrt(), atol=1e-12, rtol=1e-9)
        torch.testing.assert_close(torch.linalg.matrix_norm(u), torch.linalg.matrix_norm(v))


def test_full_rank_gives_the_weight_and_the_type_stays() -> None:
    for kind, error in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        weight = torch.randn(16, 16).to(kind)
        u, v = low_rank_factors(weight, 16)
        assert u.dtype is v.dtype is kind
        assert (u.double() @ v.double() - weight.double()).abs().max() < error


def test_impossible_ranks_and_weights_raise() -> None:
    for rank in (0, 5):
        with pytest.raises(ValueError, match="from 1 to 4"):
            low_rank_factors(torch.ones(4, 6), rank)
    with pytest.raises(ValueError, match="finite"):
        low_rank_factors(torch.full((2, 2), float("inf")), 1)
