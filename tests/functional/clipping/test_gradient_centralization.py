"""Centralization as worked by hand, and sharded against whole."""

from typing import Any

import pytest
import torch

from lightning_grad.functional import centralize_
from tests.functional.clipping.shards import PLACED, SHAPES, draw, shard
from tests.functional.ranks import on_two_ranks


def test_centralized_as_worked_by_hand() -> None:
    matrix, image = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]]), torch.tensor([[[1.0, 3.0], [5.0, 7.0]]])
    centralize_([matrix, image])
    assert matrix.tolist() == [[-2.0, -1.0, 3.0], [-1.0, -1.0, 2.0]]
    assert image.tolist() == [[[-3.0, -1.0], [1.0, 3.0]]]


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_have_no_mean_and_vectors_stay(shape: tuple[int, ...]) -> None:
    gradient, before = draw(shape), draw(shape)
    centralize_([gradient])
    if len(shape) < 2:
        assert torch.equal(gradient, before)
        return
    rows, rows_before = gradient.flatten(1), before.flatten(1)
    torch.testing.assert_close(rows.mean(1), torch.zeros(shape[0]), atol=1e-6, rtol=0)
    # Only the mean is gone: differences within a row are what they were.
    torch.testing.assert_close(rows - rows[:, :1], rows_before - rows_before[:, :1])
    once = gradient.clone()
    centralize_([gradient])
    torch.testing.assert_close(gradient, once)


def test_only_convolutions_leaves_matrices_alone() -> None:
    gradients, before = [draw(shape) for shape in SHAPES], [draw(shape) for shape in SHAPES]
    centralize_(gradients, conv_only=True)
    changed = [not torch.equal(a, b) for a, b in zip(gradients, before, strict=True)]
    assert changed == [False, False, False, True, True]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_centralization_keeps_the_dtype(dtype: torch.dtype) -> None:
    gradient = draw((64, 1000), dtype=dtype)
    centralize_([gradient])
    assert gradient.dtype == dtype
    assert gradient.double().mean(1).abs().max() < 0.02


def acts_on_shards_as_on_the_whole(rank: int, mesh: Any) -> None:
    plain = [draw(shape) for shape, _ in PLACED]
    sharded = [shard(draw(shape), mesh, dim) for shape, dim in PLACED]
    pieces = [tensor.to_local() for tensor in sharded]
    centralize_(plain)
    centralize_(sharded)
    for whole, tensor, piece in zip(plain, sharded, pieces, strict=True):
        torch.testing.assert_close(tensor.full_tensor(), whole, rtol=1e-6, atol=1e-6)
        assert torch.equal(tensor.to_local(), piece), "what this rank held before was not what was changed"


def test_dtensors() -> None:
    on_two_ranks(acts_on_shards_as_on_the_whole)
