"""The Hadamard transform equals its matrix, is its own inverse, and takes rows of any length."""

import pytest
import torch

from lightning_grad.functional import hadamard_block, hadamard_transform
from lightning_grad.functional.quantization.hadamard import _by_sums

TWO = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / 2**0.5


def matrix(size: int) -> torch.Tensor:
    found = torch.ones(1, 1, dtype=torch.float64)
    while len(found) < size:
        found = torch.kron(TWO, found)
    return found


@pytest.mark.parametrize("block", [1, 2, 8, 16, 64, 128])
def test_it_equals_the_matrix_and_is_its_own_inverse(block: int) -> None:
    rows = torch.randn(3, 384, dtype=torch.float64)
    expected = (rows.reshape(-1, block) @ matrix(block)).reshape(rows.shape)
    found = hadamard_transform(rows, block)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(hadamard_transform(found, block), rows, rtol=0, atol=1e-14)
    sums = _by_sums(rows.reshape(-1, block)).reshape(rows.shape)  # what devices other than the CPU compute
    torch.testing.assert_close(sums, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("size", "block"), [(1, 1), (27, 1), (96, 32), (192, 64), (4096, 128)])
def test_every_size_has_a_block(size: int, block: int) -> None:
    assert hadamard_block(size) == block
    assert hadamard_transform(torch.randn(2, size), block).shape == (2, size)


def test_the_released_way_fails_for_192_inputs() -> None:
    blocks = torch.block_diag(*[matrix(128)] * (192 // 128))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        torch.randn(2, 192, dtype=torch.float64) @ blocks


@pytest.mark.parametrize("block", [0, 3, 64])
def test_a_block_that_does_not_fit_is_refused(block: int) -> None:
    with pytest.raises(ValueError, match=rf"divides 96; got {block}. Use hadamard_block\(96\)"):
        hadamard_transform(torch.randn(2, 96), block)


def test_autocast_does_not_round_it() -> None:
    rows = torch.randn(4, 128)
    plain = hadamard_transform(rows, 128)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(hadamard_transform(rows, 128), plain)
        assert (rows @ matrix(128).float()).dtype == torch.bfloat16
