"""Quantization: grids of 1 to 8 bits for each output channel, rounding with gradients, Hadamard transforms."""

from lightning_grad.functional.quantization.fake_quantization import (
    fake_quantize_activation,
    fake_quantize_weight,
    near_boundary,
    quantized_values,
    round_through,
)
from lightning_grad.functional.quantization.grids import (
    QuantizedTensor,
    exact_scales,
    integer_range,
    quantize_weight,
    read_quantized_weight,
    weight_scales,
)
from lightning_grad.functional.quantization.hadamard import hadamard_block, hadamard_transform

__all__ = [
    "QuantizedTensor",
    "exact_scales",
    "fake_quantize_activation",
    "fake_quantize_weight",
    "hadamard_block",
    "hadamard_transform",
    "integer_range",
    "near_boundary",
    "quantize_weight",
    "quantized_values",
    "read_quantized_weight",
    "round_through",
    "weight_scales",
]
