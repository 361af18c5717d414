"""Gradients to clip, and what makes two lists of them the same."""

from typing import Any

import torch
from torch import Tensor, nn

NAN, INF = float("nan"), float("inf")

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
SHAPES = [(), (1,), (7,), (3, 5), (1, 4), (4, 1), (2, 3, 4), (3, 2, 3, 3), (5, 1, 1, 2)]


def draw(seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> list[Tensor]:
    """Return one tensor of each shape, their sizes spread over three decades."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10.0 ** (3 * torch.rand(len(SHAPES), generator=generator) - 1.5)
    return [
        (torch.randn(shape, generator=generator) * size * scale).to(dtype)
        for shape, size in zip(SHAPES, sizes, strict=True)
    ]


def copies(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


def as_parameters(gradients: list[Tensor]) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    return parameters


def assert_same_bits(found: Any, expected: Any) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(
            a.nan_to_num(nan=0.0, posinf=INF, neginf=-INF), b.nan_to_num(nan=0.0, posinf=INF, neginf=-INF)
        )
        assert torch.equal(a.signbit() & ~a.isnan(), b.signbit() & ~b.isnan())  # also that of zeros
