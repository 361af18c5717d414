"""Grids have the levels and scales of the papers, hold their values exactly, and can be read back from a file."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.stats import norm
from torch import Tensor

from lightning_grad.functional import (
    exact_scales,
    integer_range,
    quantize_weight,
    read_quantized_weight,
    weight_scales,
)
from lightning_grad.functional.quantization.grids import GAUSSIAN_CLIPS, QUANTIZERS, Quantizer

GRIDS: list[tuple[Quantizer, int]] = [(q, bits) for q in QUANTIZERS for bits in range(1, 9) if (q, bits) != ("ste", 1)]


def published(rows: Tensor, bits: int, quantizer: str) -> Tensor:
    """Quantize as the papers' code does, without its faults, in float64."""
    if quantizer == "ste":
        top = 2 ** (bits - 1) - 1
        step = rows.abs().amax(1, keepdim=True) / top
        return (rows / step).round() * step
    if quantizer == "quest":
        clip = GAUSSIAN_CLIPS[bits] * rows.square().mean(1, keepdim=True).sqrt() + 1e-8
        step = 2 * clip / (2**bits - 1)
        return ((rows.clamp(-clip, clip) / step + 0.5).round() - 0.5) * step
    scale, n = 2 * rows.abs().mean(1, keepdim=True), 2.0 ** (bits - 1)
    unit = (rows / scale).clamp(-1, 1 - 1e-6)
    return scale * ((unit * n - 0.5).round().clamp(-n, n - 1) + 0.5) / n


@pytest.mark.parametrize(("quantizer", "bits"), GRIDS)
def test_values_are_those_of_the_papers(quantizer: Quantizer, bits: int) -> None:
    weight = torch.randn(16, 512, dtype=torch.float64)
    expected, found = published(weight, bits, quantizer), quantize_weight(weight, bits, quantizer).dequantize()
    # The scales are rounded to all bits but eight, so in float64 hardly any entry rounds the other way.
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    low, high = integer_range(bits, quantizer)
    levels = max(len(row.unique()) for row in found)
    assert levels <= high - low + 1 == 2**bits - (quantizer == "ste")
    assert levels == high - low + 1 or bits > 4
    assert bool((found == 0).any()) == (quantizer == "ste")


def test_the_released_statsq_has_three_levels_at_one_bit() -> None:
    weight = torch.randn(1, 4096)
    scale = 2 * weight.abs().mean()
    released = scale * ((weight / scale).clamp(-1, 1 - 1e-6).sub(0.5).round() + 0.5)
    assert len(released.unique()) == 3
    assert len(quantize_weight(weight, 1, "statsq").dequantize().unique()) == 2


@pytest.mark.parametrize("bits", GAUSSIAN_CLIPS)
def test_the_gaussian_clip_minimizes_the_error_of_normal_weights(bits: int) -> None:
    def error(clip: float) -> float:
        levels = np.linspace(-clip, clip, 2**bits)
        edges = np.r_[-30.0, (levels[1:] + levels[:-1]) / 2, 30.0]
        density, share = norm.pdf(edges), np.diff(norm.cdf(edges))
        squares = share - np.diff(edges * density)
        return float((squares + 2 * levels * np.diff(density) + levels**2 * share).sum())

    clip = GAUSSIAN_CLIPS[bits]
    best = minimize_scalar(error, bounds=(0.3, 6), method="bounded", options={"xatol": 1e-9})
    assert abs(best.x - clip) < (1.5e-3 if bits < 7 else 0.04), "those of 7 and 8 bits are released as 3.601 and 3.885"
    assert error(clip) < 1.002 * best.fun < error(clip * 0.9)


@pytest.mark.parametrize(("quantizer", "bits"), [*GRIDS[3:], ("ste", 8)])
@pytest.mark.parametrize("shape", [(64, 96), (8, 4, 3, 3)])
def test_integers_and_scales_can_be_read_from_the_values_alone(
    quantizer: Quantizer, bits: int, shape: tuple[int, ...]
) -> None:
    quantized = quantize_weight(torch.randn(shape), bits, quantizer)
    weight = quantized.dequantize()
    read = read_quantized_weight(weight, bits, quantizer)
    assert torch.equal(read.dequantize(), weight)
    assert torch.equal(read.integers, quantized.integers)
    assert torch.equal(read.scales, quantized.scales)
    again = quantize_weight(weight, bits, quantizer).dequantize()
    if bits > 1:
        assert torch.equal(again, weight) == (quantizer == "ste"), (
            "this is why a weight is read and not quantized again"
        )


def test_every_level_is_exact_and_plain_scales_are_not() -> None:
    plain = torch.rand(1000) + 0.01
    scales, integers = exact_scales(plain), torch.arange(-128, 128)[:, None]

    def is_exact(scales: Tensor) -> bool:
        return bool(((integers * scales).double() == integers * scales.double()).all())

    assert is_exact(scales)
    assert not is_exact(plain)
    assert float((scales / plain - 1).abs().max()) <= 2**-16
    largest = plain * 127
    assert not torch.equal(largest / 127, plain), "quantizing again would move such a row"


def test_a_weight_on_no_grid_is_refused() -> None:
    with pytest.raises(ValueError, match=r"4 of 4 output channels lie on no grid of 3 bits of quantizer='quest'"):
        read_quantized_weight(torch.randn(4, 64), 3, "quest")
    with pytest.raises(ValueError, match="lie on no grid of 4 bits"):
        read_quantized_weight(quantize_weight(torch.randn(4, 64), 8).dequantize(), 4)


def test_rows_of_zeros_stay_zero() -> None:
    weight = torch.zeros(3, 8)
    weight[1] = torch.randn(8)
    quantized = quantize_weight(weight, 8)
    assert torch.equal(quantized.dequantize()[[0, 2]], torch.zeros(2, 8))
    assert torch.equal(read_quantized_weight(quantized.dequantize(), 8).integers, quantized.integers)
    assert quantize_weight(weight, 4, "statsq").dequantize().isfinite().all()


def test_one_bad_row_spoils_no_other() -> None:
    weight = torch.randn(3, 8)
    weight[1, 2] = torch.nan
    scales = weight_scales(weight, 8)
    assert scales[1].isnan()
    assert torch.equal(scales[[0, 2]], weight_scales(weight[[0, 2]], 8))


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("hadamard", [False, True])
def test_output_channels_may_be_any_dimension(quantizer: Quantizer, hadamard: bool) -> None:
    weight = torch.randn(4, 16, 3, dtype=torch.float64)
    expected = quantize_weight(weight.transpose(0, 1), 3, quantizer, hadamard=hadamard)
    found = quantize_weight(weight, 3, quantizer, dim=1, hadamard=hadamard)
    assert found.scales.shape == (1, 16, 1)
    assert torch.equal(found.integers, expected.integers.transpose(0, 1))
    assert torch.equal(found.dequantize(), expected.dequantize().transpose(0, 1))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0,), "from 1 to 8; got 0"),
        ((9,), "from 1 to 8; got 9"),
        ((True,), "from 1 to 8; got True"),
        ((4.0,), r"an integer from 1 to 8; got 4\.0"),
        ((1, "ste"), r"no grid of 1 bit.*quantizer='quest' or 'statsq'"),
        ((4, "lsq"), "must be 'ste', 'quest' or 'statsq'; got 'lsq'"),
    ],
)
def test_impossible_grids_are_refused(arguments: tuple[object, ...], words: str) -> None:
    for function in (quantize_weight, weight_scales, read_quantized_weight):
        with pytest.raises(ValueError, match=words):
            function(torch.randn(2, 4), *arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"at least two dimensions; got the shape \(4,\)"):
        quantize_weight(torch.randn(4), 4)
