"""Signs through bytes and back, the magnitude with the least error, and the size against the formula."""

import math

import pytest
import torch
from torch import Tensor

from lightning_grad.functional import pack_signs, sign_bytes, split_parts, unpack_signs
from lightning_grad.functional.communication.sign_messages import part_numel

CASES = [(1, 1), (7, 2), (8, 1), (16, 2), (100, 3), (1025, 4)]  # entries, rows


def draw(numel: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a flat tensor, its rows and how many entries of each are not padding."""
    flat = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
    flat[0] = 0.0
    part = part_numel(numel, rows)
    return flat, split_parts(flat, rows), torch.tensor([min(max(numel - part * row, 0), part) for row in range(rows)])


@pytest.mark.parametrize(("numel", "rows"), CASES)
def test_signs_come_back_with_the_mean_magnitude_of_their_row(numel: int, rows: int) -> None:
    flat, parts, counts = draw(numel, rows)
    message = pack_signs([parts], [counts])
    assert message.dtype == torch.uint8
    assert message.numel() == sign_bytes(numel, rows)
    (found,) = unpack_signs(message, [parts.shape[1]])
    for row, piece in zip(found, flat.split(parts.shape[1]), strict=False):
        expected = torch.where(piece >= 0, piece.abs().mean(), -piece.abs().mean())
        torch.testing.assert_close(row[: len(piece)], expected, rtol=1e-6, atol=0)


def test_each_tensor_and_row_has_its_own_magnitude() -> None:
    drawn = [draw(numel, 3) for numel in (50, 2000, 9)]
    sizes = [parts.shape[1] for _, parts, _ in drawn]
    message = pack_signs([parts for _, parts, _ in drawn], [counts for _, _, counts in drawn])
    assert message.shape == (3, sum(size // 8 + 4 for size in sizes))
    for (_, parts, counts), size, found in zip(drawn, sizes, unpack_signs(message, sizes), strict=True):
        (alone,) = unpack_signs(pack_signs([parts], [counts]), [size])
        assert torch.equal(found, alone)


def test_a_row_of_a_message_is_a_message() -> None:
    _, parts, counts = draw(1000, 4)
    message = pack_signs([parts], [counts])
    whole = unpack_signs(message, [parts.shape[1]])[0]
    assert torch.equal(unpack_signs(message[2:3], [parts.shape[1]])[0], whole[2:3])


def test_no_other_magnitude_has_a_smaller_error() -> None:
    flat, parts, counts = draw(800, 1)
    (found,) = unpack_signs(pack_signs([parts], [counts]), [800])
    error = (flat - found[0]).norm()
    for factor in (0.9, 0.99, 1.01, 1.1):
        assert (flat - factor * found[0]).norm() > error
    assert error < flat.norm(), "a contraction, as error feedback needs"


def test_values_of_two_types_become_float32() -> None:
    _, parts, counts = draw(64, 2)
    for kind in (torch.float64, torch.bfloat16):
        (found,) = unpack_signs(pack_signs([parts.to(kind)], [counts]), [32])
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, unpack_signs(pack_signs([parts], [counts]), [32])[0], rtol=1e-2, atol=0)


@pytest.mark.parametrize("ranks", [1, 2, 3, 64])
def test_a_part_is_whole_bytes_and_the_parts_hold_all_entries(ranks: int) -> None:
    for numel in (1, 8, 1000, 4096):
        part = part_numel(numel, ranks)
        assert part == 8 * math.ceil(numel / (8 * ranks))
        rows = split_parts(torch.arange(1.0, numel + 1), ranks)
        assert rows.shape == (ranks, part)
        assert rows.sum() == numel * (numel + 1) / 2


def test_traffic_is_32_times_less_than_float32_for_any_number_of_ranks() -> None:
    for ranks in (1, 2, 8, 64):
        assert 4 * 2**24 / sign_bytes(2**24, ranks) == pytest.approx(32, rel=1e-2)
