"""Rules for convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lightning_grad.functional.gradients._ghost.binding import Binding, Rows, Term, first, given
from lightning_grad.functional.gradients._ghost.contributions import (
    Contribution,
    Convolution,
    ConvolutionSettings,
    Dense,
)


def _sum_of_pixels(gradient: Tensor, rows: Rows) -> Contribution:
    return Dense(rows(gradient).flatten(3).sum((1, 3)))


def _numbers(value: Any, dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value) * (dims if len(value) == 1 else 1)


def _same_padding(weight: Tensor, dilation: Sequence[int]) -> list[tuple[int, int]]:
    """Return what torch pads before and after each dimension for ``padding="same"``."""
    totals = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    return [(total // 2, total - total // 2) for total in totals]


def _convolution_term(input: Tensor, settings: ConvolutionSettings, pads: Sequence[tuple[int, int]] = ()) -> Term:
    kept = input.detach()
    before_and_after = [amount for pair in reversed(pads) for amount in pair]

    def term(gradient: Tensor, rows: Rows) -> Contribution:
        padded = F.pad(kept, before_and_after) if any(before_and_after) else kept
        return Convolution(rows(padded), rows(gradient), settings)

    return term


def convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Binding | None:
    dims = weight.dim() - 2
    if input.dim() != weight.dim():
        return None  # an image without a batch
    steps, spread, pads = _numbers(stride, dims), _numbers(dilation, dims), []
    if padding == "same":
        pads, padding = _same_padding(weight, spread), 0
    elif padding == "valid":
        padding = 0
    settings = ConvolutionSettings(tuple(weight.shape), steps, _numbers(padding, dims), spread, groups)
    term = _convolution_term(input, settings, pads)
    return Binding(given((weight, term), (bias, _sum_of_pixels)), first, (input,))


def transposed_convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Binding | None:
    dims = weight.dim() - 2
    if input.dim() != weight.dim():
        return None
    steps, pads, spread, more = (_numbers(value, dims) for value in (stride, padding, dilation, output_padding))
    settings = ConvolutionSettings(tuple(weight.shape), steps, pads, spread, groups, True, more)
    term = _convolution_term(input, settings)
    return Binding(given((weight, term), (bias, _sum_of_pixels)), first, (input,))
