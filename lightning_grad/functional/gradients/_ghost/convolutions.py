"""Convolutions: their contributions to per-sample gradients, and their rule."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_grad.functional.gradients._ghost import contributions

_GROUPED = 4  # oneDNN computes many groups fastest if their gradients fill a quarter of a chunk


def has_fast_groups(images: Tensor) -> bool:
    """Return True if a convolution with one group per sample is the fastest way to all gradients: oneDNN on a CPU."""
    onednn: Any = torch.backends.mkldnn
    is_there = bool(onednn.is_available() and onednn.enabled)
    is_plain = images.device.type == "cpu" and images.dtype == torch.float32
    return is_there and is_plain and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


@dataclass(frozen=True)
class ConvolutionSettings:
    """The geometry of a convolution, with one number per spatial dimension."""

    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    @property
    def kernel(self) -> tuple[int, ...]:
        """Size of the kernel."""
        return self.weight[2:]

    @property
    def is_pointwise(self) -> bool:
        """Whether each output depends on a single pixel."""
        return math.prod(self.kernel) == 1 and not any(self.padding)


@dataclass
class Convolution:
    """Gradients of the weight of a convolution, transposed or not, with any number of groups.

    Args:
        inputs: (B, M, C, ...): M images per sample.
        gradients: Gradients of the outputs, (B, M, O, ...).
        settings: Geometry of the convolution.
    """

    inputs: Tensor
    gradients: Tensor
    settings: ConvolutionSettings

    def __post_init__(self) -> None:
        s = self.settings
        # The tensor that the kernel slides over, and the one that each of its positions is multiplied by.
        self._scanned, self._met = (self.gradients, self.inputs) if s.transposed else (self.inputs, self.gradients)
        self._positions = self._met.shape[1] * math.prod(self._met.shape[3:])
        rows, columns = s.weight[0] // s.groups, math.prod(s.weight[1:])
        # With few positions, Gram matrices are cheaper than the gradient.
        self._is_short = self._positions * (rows + columns) <= rows * columns

    def squared(self) -> Tensor:
        samples = self.inputs.shape[0]
        if self._is_odd:
            return torch.cat([contributions.sum_squares(self.dense(b, b + 1)) for b in range(samples)])
        if not self._is_short and not self.settings.is_pointwise and has_fast_groups(self.inputs):
            parts = contributions.chunks(self.inputs, _GROUPED * math.prod(self.settings.weight))
            return torch.cat([contributions.sum_squares(self._backward(*part)) for part in parts])
        return torch.cat([self._products(*chunk) for chunk in contributions.chunks(self.inputs, self._entries)])

    def dense(self, start: int, stop: int) -> Tensor:
        if has_fast_groups(self.inputs):
            return self._backward(start, stop)
        return torch.cat([self._backward(b, b + 1) for b in range(start, stop)])

    def _backward(self, start: int, stop: int) -> Tensor:
        """Return the gradients of a range of samples as autograd computes them.

        The samples are the groups of one convolution, so none of them sees another one's pixels.
        """
        s, samples = self.settings, stop - start
        images, gradients = (contributions.side_by_side(t[start:stop]) for t in (self.inputs, self.gradients))
        weight = images.new_empty(1).expand(samples * s.weight[0], *s.weight[1:])  # only its shape is used
        padding = list(s.output_padding) or [0] * len(s.kernel)
        arguments = (list(s.stride), list(s.padding), list(s.dilation), s.transposed, padding, samples * s.groups)
        mask = [False, True, False]
        found: Tensor = torch.ops.aten.convolution_backward(gradients, images, weight, None, *arguments, mask)[1]
        return found.view(samples, *s.weight)

    @property
    def _is_odd(self) -> bool:
        """Whether the output of a transposed convolution has pixels at the border that no kernel position reaches."""
        pairs = zip(self.settings.output_padding, self.settings.stride, strict=False)
        return any(padding >= stride for padding, stride in pairs)

    @property
    def _entries(self) -> int:
        """Number of entries in a sample's temporaries."""
        s, few = self.settings, self._is_short
        unfolded = self._scanned[0].numel() * (math.prod(s.kernel) if few else s.kernel[-1]) // s.stride[-1]
        return max(unfolded, math.prod(s.weight), 2 * s.groups * self._positions**2 if few else 0)

    def _products(self, start: int, stop: int) -> Tensor:
        """Return the squared norms of a range of samples, by Gram matrices or by products, whichever is cheaper."""
        s, positions = self.settings, self._positions
        # (b G, M, rows, ...)
        met = torch.unflatten(self._met[start:stop], 2, (s.groups, -1)).movedim(2, 1).flatten(0, 1)
        left = met.flatten(3).transpose(2, 3).reshape(len(met), positions, -1)
        columns = _columns(self._scanned[start:stop], s, tuple(self._met.shape[3:]))
        if self._is_short:
            squares = contributions.Outer(left, torch.cat(list(columns), 2)).squared()
        else:  # each line of the kernel is a separate part of the weight, so their squares can be added
            squares = sum(
                (contributions.sum_squares(torch.bmm(left.mT, part)) for part in columns), left.new_zeros(len(met))
            )
        return squares.view(stop - start, s.groups).sum(1)


def _columns(scanned: Tensor, settings: ConvolutionSettings, size: tuple[int, ...]) -> Iterator[Tensor]:
    """Yield the unfolded input, (b * groups, M * positions, columns), separately for each line of the kernel.

    Unfolding along the last dimension only, with channels last, copies far less memory than ``F.unfold``.

    Args:
        scanned: (b, M, C, ...).
        settings: Geometry of the convolution.
        size: Number of positions in each dimension.
    """
    s = settings
    groups = torch.unflatten(scanned, 2, (s.groups, -1)).movedim(2, 1).flatten(0, 1)
    if s.is_pointwise:
        for dim, (n, step) in enumerate(zip(size, s.stride, strict=True), start=3):
            groups = groups.narrow(dim, 0, (n - 1) * step + 1)[(slice(None),) * dim + (slice(None, None, step),)]
        pixels = groups.flatten(3).transpose(2, 3)
        yield pixels.reshape(len(groups), -1, pixels.shape[3])
        return
    lines = _unfold_lines(_padded_channels_last(groups, s.padding), s, size[-1])
    for offset in itertools.product(*(range(k) for k in s.kernel[:-1])):
        begins = [i * d for i, d in zip(offset, s.dilation, strict=False)]
        seen = [slice(b, b + (n - 1) * t + 1, t) for b, n, t in zip(begins, size, s.stride, strict=False)]
        part = lines[(slice(None), slice(None), *seen)]
        yield part.reshape(len(part), part.shape[1] * math.prod(size), -1)


def _padded_channels_last(images: Tensor, padding: Sequence[int]) -> Tensor:
    """Convert (N, M, C, ...) to (N, M, ..., C) with zero padding, in one copy."""
    last = images.movedim(2, -1)
    if not any(padding):
        return last.contiguous()
    sizes = [size + 2 * p for size, p in zip(last.shape[2:-1], padding, strict=True)]
    padded = last.new_zeros(*last.shape[:2], *sizes, last.shape[-1])
    inside = padded
    for dim, (size, p) in enumerate(zip(last.shape[2:-1], padding, strict=True), start=2):
        inside = inside.narrow(dim, p, size)
    inside.copy_(last)
    return padded


def _unfold_lines(last: Tensor, settings: ConvolutionSettings, positions: int) -> Tensor:
    """Unfold (N, M, ..., pixels, C) along the last spatial dimension to (N, M, ..., positions, kernel * C)."""
    step, spread, channels = settings.stride[-1], settings.dilation[-1], last.shape[-1]
    shape = (*last.shape[:-2], positions, settings.kernel[-1], channels)
    strides = (*last.stride()[:-2], step * channels, spread * channels, 1)
    return last.as_strided(shape, strides).flatten(-2)


def _numbers(value: Any, dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value) * (dims if len(value) == 1 else 1)


def _same_padding(weight: Tensor, dilation: Sequence[int]) -> list[tuple[int, int]]:
    """Return torch's padding before and after each dimension for ``padding="same"``."""
    totals = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    return [(total // 2, total - total // 2) for total in totals]


def convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    output_padding: Any = None,  # given for a transposed convolution only
) -> contributions.Binding | None:
    dims = weight.dim() - 2
    if input.dim() != weight.dim():
        return None  # a single image without a batch dimension
    transposed = output_padding is not None
    steps, spread, more = (_numbers(value, dims) for value in (stride, dilation, output_padding or 0))
    pads = _same_padding(weight, spread) if padding == "same" else []
    around = _numbers(0 if isinstance(padding, str) else padding, dims)
    settings = ConvolutionSettings(
        tuple(weight.shape), steps, around, spread, groups, transposed, more if transposed else ()
    )
    kept = input.detach()
    before_and_after = [amount for pair in reversed(pads) for amount in pair]

    def term(gradient: Tensor, rows: contributions.Rows) -> contributions.Contribution:
        padded = F.pad(kept, before_and_after) if any(before_and_after) else kept
        return Convolution(rows(padded), rows(gradient), settings)

    def shift(gradient: Tensor, rows: contributions.Rows) -> contributions.Contribution:
        return contributions.Dense(contributions.per_channel(rows(gradient)))

    return contributions.Binding(contributions.given((weight, term), (bias, shift)), contributions.first, (input,))
