"""Gradient noise by its statistics, and sharded against whole."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_grad.functional import (
    add_gradient_noise_,
    noise_deviation,
)
from lightning_grad.functional.clipping.gradient_noise import _PIECE
from tests.functional.clipping.shards import PLACED, shard
from tests.functional.ranks import on_two_ranks

SIZE = (400, 500)


@pytest.mark.parametrize(
    ("step", "eta", "expected"),
    [(0, 0.01, 0.1), (100, 0.3, math.sqrt(0.3 / 101**0.55)), (1000, 1.0, math.sqrt(1.0 / 1001**0.55)), (7, 0.0, 0.0)],
)
def test_noise_has_the_deviation_of_the_paper(step: int, eta: float, expected: float) -> None:
    deviation = noise_deviation(step, eta)
    assert deviation == pytest.approx(expected, rel=1e-12)
    gradient = torch.zeros(SIZE)
    add_gradient_noise_([gradient], deviation, seed=step)
    assert gradient.std().item() == pytest.approx(expected, rel=0.02)
    assert abs(gradient.mean().item()) <= 0.02 * expected


def test_noise_dies_away_faster_with_more_decay() -> None:
    assert noise_deviation(50, 0.3, decay=0.0) == pytest.approx(math.sqrt(0.3))
    assert noise_deviation(50, 0.3, decay=1.0) == pytest.approx(math.sqrt(0.3 / 51))


def noise_of(seed: int, count: int = 1, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    gradients = [torch.zeros(SIZE, dtype=dtype) for _ in range(count)]
    add_gradient_noise_(gradients, 1.0, seed)
    return gradients


def test_noise_is_that_of_its_seed() -> None:
    assert torch.equal(*noise_of(5), *noise_of(5))
    assert not torch.isclose(*noise_of(5), *noise_of(6)).float().mean() > 0.01


def correlation(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()


def test_neighbours_are_uncorrelated() -> None:
    first, second = noise_of(3, count=2)
    bound = 5 / math.sqrt(first.numel())  # five deviations of the correlation of independent draws
    assert abs(correlation(first, second)) < bound, "two gradients of one step"
    assert abs(correlation(first, *noise_of(4))) < bound, "one gradient in two steps"
    assert abs(correlation(first[:, 1:], first[:, :-1])) < bound, "entries side by side"
    assert abs(correlation(first[1:], first[:-1])) < bound, "rows side by side"


def test_noise_is_added_to_what_is_there() -> None:
    gradient = torch.full(SIZE, 7.0)
    add_gradient_noise_([gradient], 0.5, seed=1)
    torch.testing.assert_close(gradient, 7.0 + 0.5 * noise_of(1)[0])


def test_the_global_random_state_is_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    state, first = torch.get_rng_state(), noise_of(8)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(*first, *noise_of(8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_noise_in_other_dtypes(dtype: torch.dtype) -> None:
    (noise,) = noise_of(1, dtype=dtype)
    assert noise.dtype == dtype
    assert noise.double().std().item() == pytest.approx(1.0, rel=0.02)
    if dtype != torch.float64:
        assert torch.equal(noise, noise_of(1)[0].to(dtype)), "drawn in float32 and rounded once"


def test_noise_takes_seeds_of_62_bits() -> None:
    gradient = torch.zeros(3)
    add_gradient_noise_([gradient], 1.0, seed=2**62 - 1)
    assert gradient.isfinite().all()


def noise_of_shards_is_that_of_the_whole(rank: int, mesh: Any) -> None:
    torch.manual_seed(rank)  # the ranks' own random states do not matter
    plain = [torch.zeros(shape) for shape, _ in PLACED]
    sharded = [shard(torch.zeros(shape), mesh, dim) for shape, dim in PLACED]
    add_gradient_noise_(plain, 1.0, seed=11)
    add_gradient_noise_(sharded, 1.0, seed=11)
    for whole, tensor in zip(plain, sharded, strict=True):
        assert torch.equal(tensor.full_tensor(), whole)


def test_dtensors() -> None:
    on_two_ranks(noise_of_shards_is_that_of_the_whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_noise_in_pieces_is_that_of_one_draw(dtype: torch.dtype) -> None:
    """torch draws 16 normal numbers at a time; the pieces rely on that."""
    sizes = [2 * _PIECE, 2 * _PIECE + 1, 7, 2 * _PIECE + 15, 2 * _PIECE + 16, 3 * _PIECE - 1, 4 * _PIECE + 17, 100]
    gradients = [torch.linspace(-1, 1, size).to(dtype) for size in sizes] + [torch.ones(600, 400, dtype=dtype).T]
    expected, generator = [], torch.Generator().manual_seed(3)
    for gradient in gradients:
        drawn = torch.promote_types(dtype, torch.float32)
        expected.append(gradient.clone().add_(torch.randn(gradient.shape, generator=generator, dtype=drawn), alpha=0.3))
    add_gradient_noise_(gradients, 0.3, seed=3)
    for gradient, other in zip(gradients, expected, strict=True):
        assert torch.equal(gradient, other)
