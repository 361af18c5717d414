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
from lightning_grad.functional.quantization.learned_rounding import (
    LearnedRoundings,
    SoftRounding,
    learn_rounding,
    mse_scales,
)
from lightning_grad.functional.quantization.outliers import MixedTensor, outlier_mask, with_outliers
from lightning_grad.functional.quantization.rounding_flips import flip_roundings
from lightning_grad.functional.quantization.trained_scales import rescale_, round_to_scales_

__all__ = [
    "LearnedRoundings",
    "MixedTensor",
    "QuantizedTensor",
    "SoftRounding",
    "exact_scales",
    "fake_quantize_activation",
    "fake_quantize_weight",
    "flip_roundings",
    "hadamard_block",
    "hadamard_transform",
    "integer_range",
    "learn_rounding",
    "mse_scales",
    "near_boundary",
    "outlier_mask",
    "quantize_weight",
    "quantized_values",
    "read_quantized_weight",
    "rescale_",
    "round_through",
    "round_to_scales_",
    "weight_scales",
    "with_outliers",
]
