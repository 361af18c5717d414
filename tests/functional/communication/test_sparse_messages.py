"""Pairs through a buffer and back, and its size against the formula."""

import math

import pytest
import torch
from torch import Tensor

from lightning_grad.functional import add_pairs_, pack_pairs, unpack_pairs
from lightning_grad.functional.communication.sparse_messages import pairs_bytes

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def draw(counts: list[int], dtype: torch.dtype, numel: int = 1000) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(sum(counts))
    indices = [torch.randperm(numel, generator=generator)[:count] for count in counts]
    return indices, [torch.randn(count, generator=generator).to(dtype) for count in counts]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", [[1], [3], [4, 1, 7], [1, 1], [500, 3]], ids=str)
def test_pairs_come_back_as_they_were(counts: list[int], dtype: torch.dtype) -> None:
    indices, values = draw(counts, dtype)
    message = pack_pairs(indices, values, counts, dtype)
    assert message.dtype == torch.uint8
    assert message.shape == (pairs_bytes(counts, dtype),)
    for index, value, (found, carried) in zip(indices, values, unpack_pairs(message, counts, dtype), strict=True):
        assert torch.equal(found.long(), index)
        assert carried.dtype == dtype
        assert torch.equal(carried, value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_of_a_gathered_message_can_be_read(dtype: torch.dtype) -> None:
    """Rows lie behind each other, and each must begin at a whole word."""
    counts = [3, 2]
    made = [draw(counts, dtype, numel) for numel in (100, 50, 10)]
    everyone = torch.stack([pack_pairs(*pairs, counts, dtype) for pairs in made])
    for row, (indices, values) in zip(everyone, made, strict=True):
        for index, value, (found, carried) in zip(indices, values, unpack_pairs(row, counts, dtype), strict=True):
            assert torch.equal(found.long(), index)
            assert torch.equal(carried, value)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 8), (torch.float16, 6), (torch.bfloat16, 6)], ids=str)
def test_the_size_is_that_of_the_pairs_in_whole_words(dtype: torch.dtype, size: int) -> None:
    for counts in ([1], [2], [3], [1, 2, 4], [1000]):
        assert pairs_bytes(counts, dtype) == 4 * math.ceil(sum(counts) * size / 4)
    assert pairs_bytes([]) == 0


def test_fewer_pairs_than_their_count_are_filled_up_with_nothing() -> None:
    message = pack_pairs([torch.tensor([7, 3]), torch.tensor([5])], [torch.tensor([1.0, 2.0]), torch.ones(1)], [4, 1])
    (first, values), (second, _) = unpack_pairs(message, [4, 1])
    assert first.tolist() == [7, 3, 0, 0]
    assert values.tolist() == [1.0, 2.0, 0.0, 0.0]
    assert second.tolist() == [5]
    assert add_pairs_(torch.ones(8), first, values).tolist() == [1, 1, 1, 3, 1, 1, 1, 2]


def test_large_indices_survive() -> None:
    message = pack_pairs([torch.tensor([2**31 - 1, 0])], [torch.tensor([1.0, 2.0])], [2])
    assert unpack_pairs(message, [2])[0][0].tolist() == [2**31 - 1, 0]


def test_what_is_not_finite_survives() -> None:
    values = torch.tensor([float("nan"), float("inf"), -0.0])
    carried = unpack_pairs(pack_pairs([torch.arange(3)], [values], [3]), [3])[0][1]
    assert torch.equal(carried.view(torch.int32), values.view(torch.int32))


@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_pairs_are_added_with_a_factor_in_the_type_of_the_target(target: torch.dtype) -> None:
    result = torch.ones(4, dtype=target)
    added = add_pairs_(result, torch.tensor([2, 0], dtype=torch.int32), torch.tensor([4.0, -8.0]).half(), factor=0.25)
    assert added is result
    assert result.tolist() == [-1.0, 1.0, 2.0, 1.0]
