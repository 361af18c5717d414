"""Weights as integers times scales: the grid, its groups, and integers that survive any change of the scales."""

import pytest
import torch

from lightning_grad.functional import integer_range, quantize_weight, rescale_, round_to_scales_


def make(shape: tuple[int, ...] = (6, 8), dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_without_groups_it_is_the_grid_of_quantize_weight(bits: int, dim: int) -> None:
    weight, expected = make(), quantize_weight(make(), bits, dim=dim)
    scales = round_to_scales_(weight, bits, dim=dim)
    assert torch.equal(weight, expected.dequantize())
    assert torch.equal(scales.flatten(), expected.scales.flatten())


def test_each_group_has_its_own_grid() -> None:
    weight = make((4, 3, 2, 2))
    scales = round_to_scales_(weight, 3, group_size=4)
    assert scales.shape == (12, 1)
    units = weight.reshape(12, 4) / scales
    assert torch.equal(units, units.round())
    assert (units.abs().amax(1) == integer_range(3)[1]).all()
    with pytest.raises(ValueError, match="group_size must divide the 12 entries"):
        round_to_scales_(make((4, 3, 2, 2)), 3, group_size=5)


def test_a_weight_on_a_grid_keeps_its_integers() -> None:
    """Rounding again would derive other scales where no entry is at the end of the grid."""
    integers = torch.randint(-2, 3, (6, 8), generator=torch.Generator().manual_seed(1)).float()
    integers[:, 0], integers[:, 1] = 2, 1
    weight = integers * torch.linspace(0.5, 1.0, 6)[:, None]
    before = weight.clone()
    round_to_scales_(weight, 3)
    assert torch.equal(weight, before)
    assert not torch.equal(quantize_weight(before, 3).dequantize(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dim", [0, 1])
def test_integers_survive_many_changes(dtype: torch.dtype, dim: int) -> None:
    weight = make(dtype=dtype)
    scales = round_to_scales_(weight, 8, dim=dim)
    rows = weight if dim == 0 else weight.T
    integers = (rows.to(scales.dtype) / scales).round()
    generator = torch.Generator().manual_seed(2)
    for _ in range(200):
        after = scales * torch.randn(scales.shape, generator=generator, dtype=scales.dtype)  # also of other signs
        rescale_(weight, scales, after, dim)
        scales = after / 1.0
        factor = 1 / scales.abs().mean().clamp(0.01, 100.0)
        rescale_(weight, scales, scales * factor, dim)
        scales = scales * factor
    rows = weight if dim == 0 else weight.T
    assert torch.equal(rows, (integers * scales).to(dtype))


def test_a_row_of_zeros_stays() -> None:
    weight = torch.tensor([[0.0, 0.0], [1.0, -0.5]])
    scales = round_to_scales_(weight, 4)
    rescale_(weight, scales, scales + 0.1)
    assert weight[0].tolist() == [0.0, 0.0]
    assert weight.isfinite().all()
