"""Gradients that are not finite are found, of every dtype and on every rank."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from lightning_grad.functional import nonfinite
from tests.functional.clipping.shards import INF, NAN, SHAPES, draw, shard
from tests.functional.ranks import on_two_ranks


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_is_not_finite_is_found_where_it_is(dtype: torch.dtype, bad: float) -> None:
    gradients = [draw(shape, dtype=dtype) for shape in SHAPES]
    assert nonfinite(gradients).tolist() == [False] * 5
    for position in (0, 3):
        gradients[position].view(-1)[-1] = bad
    assert nonfinite(gradients).tolist() == [True, False, False, True, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_largest_numbers_are_finite(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    gradient = torch.full((1000,), largest, dtype=dtype)
    gradient[::2] = -largest
    assert nonfinite([gradient, torch.zeros(3, dtype=dtype)]).tolist() == [False, False]


def test_dtypes_may_be_mixed() -> None:
    gradients = [torch.tensor([65504.0]).half(), torch.tensor([INF]).bfloat16(), torch.tensor([3e38])]
    assert nonfinite(gradients).tolist() == [False, True, False]


def test_a_parameter_without_entries_is_finite() -> None:
    assert nonfinite([torch.zeros(0, 3), torch.tensor([NAN])]).tolist() == [False, True]


def one_rank_speaks_for_all(bad: float, rank: int, mesh: Any) -> None:
    for row in (0, 5):  # held by the first rank, by the second
        whole = torch.ones(6, 2)
        whole[row] = bad
        found = nonfinite([shard(torch.ones(6, 2), mesh), shard(whole, mesh), shard(whole.T.clone(), mesh, 1)])
        assert found.tolist() == [False, True, True], f"in row {row}, seen on rank {rank}"


def finite_where_a_rank_holds_nothing(rank: int, mesh: Any) -> None:
    assert nonfinite([shard(torch.ones(1), mesh), shard(torch.tensor([NAN]), mesh)]).tolist() == [False, True]


def finite_beside_plain_tensors(rank: int, mesh: Any) -> None:
    assert nonfinite([torch.ones(3), shard(torch.ones(4), mesh), torch.full((2,), INF)]).tolist() == [
        False,
        False,
        True,
    ]


DTENSOR_CHECKS: dict[str, Callable[[int, Any], None]] = {
    "nan": partial(one_rank_speaks_for_all, NAN),
    "infinity": partial(one_rank_speaks_for_all, -INF),
    "fewer rows than ranks": finite_where_a_rank_holds_nothing,
    "finite beside plain": finite_beside_plain_tensors,
}


@pytest.mark.parametrize("name", DTENSOR_CHECKS)
def test_dtensors(name: str) -> None:
    on_two_ranks(DTENSOR_CHECKS[name])
