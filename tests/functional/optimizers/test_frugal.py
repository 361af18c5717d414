"""FRUGAL's blocks: how large they are, how they move, and what a step does in them."""

import pytest
import torch

from lightning_grad.functional import active_rows, frugal_
from lightning_grad.functional.optimizers.frugal import split_rows

SHAPES = [(5, 3), (2, 7), (6, 2), (1, 4)]
ENTRIES = sum(rows * columns for rows, columns in SHAPES)


def entries(block: list[tuple[int, int]]) -> int:
    return sum(count * columns for (_, count), (_, columns) in zip(block, SHAPES, strict=True))


@pytest.mark.parametrize("density", [0.0, 0.2, 0.5, 0.83, 1.0])
def test_a_block_takes_the_density_less_at_most_a_row(density: float) -> None:
    for start in range(sum(rows for rows, _ in SHAPES)):
        block = active_rows(SHAPES, density, start)
        assert density * ENTRIES - 7 < entries(block) <= density * ENTRIES
        assert all(
            0 <= first < rows and 0 <= count <= rows for (first, count), (rows, _) in zip(block, SHAPES, strict=True)
        )


def test_blocks_one_after_another_take_each_row_in_turn() -> None:
    taken, start, rows = {}, 0, sum(rows for rows, _ in SHAPES)
    for _ in range(60):
        block = active_rows(SHAPES, 0.3, start)
        start += sum(count for _, count in block)
        for at, ((first, count), (length, _)) in enumerate(zip(block, SHAPES, strict=True)):
            for step in range(count):
                key = (at, (first + step) % length)
                taken[key] = taken.get(key, 0) + 1
    assert len(taken) == rows
    assert max(taken.values()) - min(taken.values()) <= 1


def test_a_block_that_ends_where_it_began_in_a_matrix_goes_on_at_its_first_row() -> None:
    assert active_rows([(4, 2), (1, 2)], 0.8, start=3) == [(3, 3), (0, 1)]
    active, rest = split_rows(torch.arange(4)[:, None], 3, 3)
    assert [part.flatten().tolist() for part in active] == [[3], [0, 1]]
    assert [part.flatten().tolist() for part in rest] == [[2]]


def test_rows_are_views_so_a_step_moves_the_weight_itself() -> None:
    weight = torch.zeros(3, 2, dtype=torch.float64)
    gradient = torch.tensor([[1.0, -2.0], [3.0, 0.0], [-4.0, 5.0]], dtype=torch.float64)
    mean, square = (torch.zeros(2, 2, dtype=torch.float64) for _ in range(2))
    frugal_(weight, gradient, (2, 2), mean, square, step=1, lr=0.5, eps=0.0, inactive_lr_scale=0.5)
    assert torch.allclose(weight, -0.5 * gradient.sign() * torch.tensor([[1.0], [0.5], [1.0]]), atol=1e-12)
    assert torch.allclose(mean, 0.1 * gradient[[2, 0]])  # in the order of the block
