"""Rounded weights and activations, and the gradients that pass through them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_grad.functional import (
    exact_scales,
    fake_quantize_activation,
    fake_quantize_weight,
    hadamard_transform,
    near_boundary,
    quantize_weight,
    quantized_values,
    weight_scales,
)
from lightning_grad.functional.quantization.fake_quantization import joined_values
from lightning_grad.functional.quantization.grids import GAUSSIAN_CLIPS, QUANTIZERS, Quantizer


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize("dim", [0, 1])
def test_the_values_are_those_of_integers_and_scales(quantizer: Quantizer, hadamard: bool, dim: int) -> None:
    weight = torch.randn(12, 32, 3)
    values, _ = quantized_values(weight, 4, quantizer, dim, hadamard)
    assert torch.equal(values, quantize_weight(weight, 4, quantizer, dim, hadamard).dequantize())
    assert torch.equal(values, fake_quantize_weight(weight.requires_grad_(), 4, quantizer, dim, hadamard))


@pytest.mark.parametrize("quantizer", ["ste", "statsq"])
def test_the_gradient_passes_unchanged(quantizer: Quantizer) -> None:
    weight, gradient = leaf(5, 64), torch.randn(5, 64, dtype=torch.float64)
    fake_quantize_weight(weight, 2, quantizer).backward(gradient)
    assert torch.equal(weight.grad, gradient)


@pytest.mark.parametrize("dim", [0, 1])
def test_the_gradient_of_quest_equals_autograd_through_the_transform(dim: int) -> None:
    weight, gradient = leaf(128, 128), torch.randn(128, 128, dtype=torch.float64)
    fake_quantize_weight(weight, 2, "quest", dim, hadamard=True).backward(gradient)
    found, weight.grad = weight.grad, None
    rows = hadamard_transform(weight if dim == 0 else weight.t(), 128)
    rms = rows.detach().square().mean(1, keepdim=True).sqrt()
    values = hadamard_transform(quantized_values(weight, 2, "quest", dim, True)[0].movedim(dim, 0), 128)
    mask = (values - rows).abs() <= rms * GAUSSIAN_CLIPS[2] / 3
    hadamard_transform(rows * mask, 128).backward(gradient if dim == 0 else gradient.t())
    torch.testing.assert_close(found, weight.grad, rtol=0, atol=1e-12)
    assert 0.8 < float(mask.double().mean()) < 0.99
    assert not torch.allclose(found, gradient, atol=1e-3), "without the mask it would be the gradient itself"


def test_the_trust_mask_is_a_clip() -> None:
    weight = leaf(3, 256)
    fake_quantize_weight(weight, 3, "quest").sum().backward()
    clip = GAUSSIAN_CLIPS[3] * weight.detach().square().mean(1, keepdim=True).sqrt()
    inside = weight.detach().abs() <= clip + clip / 7 + 1e-9  # half a step beyond the last level
    assert torch.equal(weight.grad, inside.double())
    assert 0 < float((~inside).double().mean()) < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_joined_calls_return_the_same_bits(dtype: torch.dtype) -> None:
    shapes = [(8, 32), (64, 32), (32, 8), (4, 2, 4, 4), (300, 200), (16, 32)]
    weights = [torch.randn(shape).to(dtype) for shape in shapes]
    weights[3] = weights[3].to(memory_format=torch.channels_last)
    dims = [0, 0, 1, 0, 0, 0]
    for weight, dim, found in zip(weights, dims, joined_values(weights, 4, dims), strict=True):
        assert torch.equal(found, quantized_values(weight, 4, dim=dim)[0])
        assert (found.dtype, found.stride()) == (weight.dtype, weight.stride())


def test_the_memory_format_of_a_weight_stays() -> None:
    weight = torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last)
    found = fake_quantize_weight(weight, 4)
    assert found.stride() == weight.stride()
    assert torch.equal(found, fake_quantize_weight(weight.contiguous(), 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_in_float32(dtype: torch.dtype) -> None:
    weight = torch.randn(8, 64).to(dtype)
    found = fake_quantize_weight(weight, 4)
    assert found.dtype == dtype
    assert torch.equal(found, fake_quantize_weight(weight.float(), 4).to(dtype))
    assert max(len(row.unique()) for row in found) <= 15


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("bits", [2, 4])
def test_near_a_boundary_a_small_move_changes_the_level(quantizer: Quantizer, bits: int) -> None:
    weight, width = torch.randn(6, 2000, dtype=torch.float64), 0.01
    scales = weight_scales(weight, bits, quantizer)

    def levels(moved: Tensor) -> Tensor:
        return quantize_weight(moved, bits, quantizer, scales=scales).integers

    move = width * (1 + 1e-6) * scales
    expected = (levels(weight + move) != levels(weight)) | (levels(weight - move) != levels(weight))
    found = near_boundary(weight, bits, quantizer, width=width)
    assert torch.equal(found, expected)
    assert 0.002 < float(found.double().mean()) < 0.03


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_activations_use_all_levels_of_an_affine_grid(bits: int) -> None:
    x = (torch.rand(7, 5, 512) - 0.3).relu().requires_grad_()
    found = fake_quantize_activation(x, bits)
    assert found.shape == x.shape
    assert {len(row.unique()) for row in found.flatten(0, 1)} == {2**bits}
    assert float(((found - x).detach().abs() / (x.detach().amax(-1, keepdim=True) / (2**bits - 1))).max()) <= 0.5 + 1e-4
    found.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    signed = quantize_weight(x.detach().flatten(0, 1), max(bits, 2)).dequantize()  # the naive grid wastes half of them
    assert max(len(row.unique()) for row in signed) <= 2 ** (max(bits, 2) - 1)


def test_affine_activations_equal_those_of_torch() -> None:
    x = torch.randn(3, 200) + 0.5
    for row, found in zip(x, fake_quantize_activation(x, 4), strict=True):
        scale = exact_scales((row.max() - row.min()) / 15)
        zero = int((-row.min() / scale).round())
        torch.testing.assert_close(found, torch.fake_quantize_per_tensor_affine(row, float(scale), zero, 0, 15))
    assert (fake_quantize_activation(torch.tensor([0.0, 0.3, -1.0]), 2) == 0).any(), "zero is a level"


def test_gaussian_activations_are_rows_of_quest() -> None:
    x = torch.randn(3, 5, 64)
    found = fake_quantize_activation(x, 3, "quest", hadamard=True)
    assert torch.equal(found, fake_quantize_weight(x.flatten(0, 1), 3, "quest", hadamard=True).view(3, 5, 64))


def test_impossible_activation_grids_are_refused() -> None:
    for quantizer in ("affine", "quest"):
        with pytest.raises(ValueError, match="from 1 to 8; got 9"):
            fake_quantize_activation(torch.randn(2, 4), 9, quantizer)
