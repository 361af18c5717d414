"""Learned rounding: choose for each weight whether it rounds down or up, by the output of its layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_grad.functional.quantization.grids import (
    QuantizedTensor,
    exact_scales,
    grid_values,
    integer_range,
    quantize_weight,
    weight_scales,
)

_STRETCH, _SHIFT = 1.2, 0.1  # the sigmoid is stretched to (-0.1, 1.1) and clipped, so shares reach 0 and 1
_CANDIDATES = 80


@torch.no_grad()
def mse_scales(weight: Tensor, bits: int, dim: int = 0) -> Tensor:
    r"""Return the scale of each output channel that minimizes the squared rounding error.

    .. math::
        \min_s \sum_i (w_i - q_s(w_i))^2, \qquad s = (1 - c / 100)\, s_{max}, \quad c = 0, 1, ..., 79

    :math:`s_{max} = \max|w| / (2^{b-1} - 1)` covers every weight. A smaller scale clips the largest ones, and rounds the
    others more finely. At 2 and 3 bits this is a large part of what post-training quantization can gain.

    Args:
        weight: Weight of two or more dimensions.
        bits: Bits b of a weight, 2 to 8.
        dim: Dimension of the output channels.

    Returns:
        Tensor: In the shape that :func:`weight_scales` returns.

    Raises:
        ValueError: If there is no such grid, or the weight has fewer than two dimensions.

    Example:
        >>> mse_scales(torch.tensor([[1.0, 0.5, -0.5, 0.5]]), bits=2)
        tensor([[0.6300]])

    References:
        Li et al., "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction", ICLR 2021, arXiv
        2102.05426; the candidates are those of its released code.
    """
    widest = weight_scales(weight, bits, dim=dim)
    others = [at for at in range(weight.ndim) if at != dim % weight.ndim]
    exact = weight.detach().to(widest.dtype)
    best, least = widest, torch.full_like(widest, torch.inf)
    low, high = integer_range(bits)
    for candidate in range(_CANDIDATES):
        scales = exact_scales(widest * (1 - candidate / 100))
        error = ((exact / scales).round_().clamp_(low, high).mul_(scales) - exact).square_().sum(others, keepdim=True)
        best = torch.where(error < least, scales, best)
        least = torch.minimum(error, least)
    return best


class SoftRounding:
    r"""The rounding of one weight while it is learned: between the level below and the level above.

    .. math::
        q = s \left( \lfloor w / s \rfloor + h \right), \qquad h = \operatorname{clip}(1.2\, \sigma(v) - 0.1,\, 0,\, 1)

    The logits v start where q = w. A weight that already lies on the grid, such as a pruned zero, and a weight beyond
    the last level have no choice and keep the nearest level.

    Args:
        weight: Weight w, of two or more dimensions.
        bits: Bits of its grid, 2 to 8.
        dim: Dimension of the output channels.
        scales: Scale s of each output channel. Default: :func:`mse_scales`.
        kept: Where the weight keeps its value instead (see :func:`outlier_mask`).

    Attributes:
        logits: v, in the shape of the weight.
        nearest: The weight rounded to the nearest levels.
        below: Integer of the level below each weight.
        has_choice: Whether a weight can round down and up.
    """

    def __init__(
        self, weight: Tensor, bits: int, dim: int = 0, scales: Tensor | None = None, kept: Tensor | None = None
    ) -> None:
        weight = weight.detach()
        rest = weight if kept is None else weight.masked_fill(kept, 0.0)
        self.weight, self.kept = weight, kept
        self.nearest = quantize_weight(
            rest, bits, dim=dim, scales=mse_scales(rest, bits, dim) if scales is None else scales
        )
        low, high = integer_range(bits)
        units = rest.to(self.nearest.scales.dtype) / self.nearest.scales
        self.below = units.floor()
        share = units - self.below
        self.has_choice = (share > 0) & (self.below >= low) & (self.below < high)
        share = share.clamp_(1e-4, 1 - 1e-4)
        self.logits = -torch.log(_STRETCH / (share + _SHIFT) - 1)
        self.logits.requires_grad_()

    def share_up(self) -> Tensor:
        """Return h: 0 rounds down, 1 rounds up."""
        return (torch.sigmoid(self.logits) * _STRETCH - _SHIFT).clamp(0, 1)

    def soft_values(self, share_up: Tensor) -> Tensor:
        """Return q for the shares h, with a gradient to the logits, in the type of the weight."""
        integers = torch.where(self.has_choice, self.below + share_up, self.nearest.integers)
        return self.with_kept(integers * self.nearest.scales)

    def with_kept(self, values: Tensor) -> Tensor:
        """Return values in the type of the weight, with the kept weights in their places."""
        values = values.to(self.weight.dtype)
        return values if self.kept is None else torch.where(self.kept, self.weight, values)

    def penalty(self, share_up: Tensor, beta: float) -> Tensor:
        r"""Return the mean of :math:`1 - |2h - 1|^\beta` over all weights with a choice: 0 if all are decided."""
        open_shares = (1 - (2 * share_up - 1).abs().pow(beta)) * self.has_choice
        return open_shares.sum() / self.has_choice.sum().clamp_min(1)

    @torch.no_grad()
    def undecided(self) -> Tensor:
        """Return the share of the weights with a choice whose h lies between 0.05 and 0.95."""
        share_up = self.share_up()
        is_open = (share_up > 0.05) & (share_up < 0.95) & self.has_choice
        return is_open.sum() / self.has_choice.sum().clamp_min(1)

    @torch.no_grad()
    def decided(self) -> QuantizedTensor:
        """Return the weight rounded as the logits say."""
        integers = torch.where(self.has_choice, self.below + (self.logits >= 0), self.nearest.integers)
        n = self.nearest
        return QuantizedTensor(integers.to(torch.int8), n.scales, n.bits, n.quantizer, n.dim)

    def values(self, rounded: QuantizedTensor) -> Tensor:
        """Return the weight that a rounding stands for, in the type of the weight."""
        return self.with_kept(grid_values(rounded.integers, rounded.scales))


@dataclass(frozen=True)
class LearnedRoundings:
    """What :func:`learn_rounding` found.

    Args:
        rounded: The roundings, one for each weight.
        nearest_error: Error of rounding to the nearest levels.
        error: Error of ``rounded``, at most ``nearest_error``.
        undecided: Share of the weights whose rounding the penalty had not decided at the end.
    """

    rounded: list[QuantizedTensor]
    nearest_error: float
    error: float
    undecided: float


def learn_rounding(
    weights: Sequence[SoftRounding],
    error: Callable[[Sequence[Tensor], int], Tensor],
    num_batches: int = 1,
    steps: int = 1000,
    strength: float = 10.0,
    warmup: float = 0.2,
    learning_rate: float = 1e-2,
    seed: int = 0,
) -> LearnedRoundings:
    r"""Learn whether each weight rounds down or up (AdaRound), for a layer or a block of layers.

    .. math::
        \min_v \; \frac{E(q(v))}{E(q_{nearest})} + \lambda \, \operatorname{mean}\left(1 - |2h - 1|^{\beta}\right)

    E is the mean squared error of the layer's output. :math:`\beta` falls from 20 to 2, so the penalty moves more and more
    shares h to 0 or 1. AdaRound and BRECQ add an absolute penalty to an absolute error, so the same :math:`\lambda`
    decides too early for small inputs and never for large ones. Here the error is relative to that of rounding to the
    nearest levels, and the penalty is a mean, so neither the scale of the inputs nor the size of the layer matters.

    The result is the learned rounding or the nearest one, whichever has the smaller error.

    Args:
        weights: Roundings of the weights to learn together; their logits change.
        error: Function (values of the weights, index of a batch) -> mean squared error of the output, a scalar.
        num_batches: Number of batches. Each step uses one of them, in random order.
        steps: Optimizer steps. The released code of BRECQ makes 20,000 at a learning rate of 1e-3.
        strength: Weight lambda of the penalty. The default leaves about one weight in ten undecided (see the card).
        warmup: Share of the steps without a penalty; 0.2 in BRECQ.
        learning_rate: Learning rate of Adam.
        seed: Seed of the order of the batches.

    Returns:
        LearnedRoundings: The roundings, and their errors over all batches.

    Raises:
        ValueError: If the error of the nearest rounding is not finite.

    Example:
        >>> weight, inputs = torch.tensor([[0.9, 0.45, 0.4]]), torch.tensor([[1.0, 2.0, 2.0]])
        >>> rounding = SoftRounding(weight, bits=2, scales=torch.tensor([[1.0]]))
        >>> def error(values, batch):
        ...     return (inputs @ (values[0] - weight).T).square().mean()
        >>> learn_rounding([rounding], error, steps=200).rounded[0].integers
        tensor([[1, 1, 0]], dtype=torch.int8)

    References:
        Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML 2020, arXiv 2004.10568. Li et
        al., "BRECQ", ICLR 2021, arXiv 2102.05426. Yvinec et al., "Gradient-Based Post-Training Quantization: Challenging
        the Status Quo", 2023, arXiv 2308.07662.
    """

    def total(rounded: Sequence[QuantizedTensor]) -> float:
        values = [weight.values(each) for weight, each in zip(weights, rounded, strict=True)]
        with torch.no_grad():
            return math.fsum(float(error(values, batch)) for batch in range(num_batches)) / num_batches

    nearest = [weight.nearest for weight in weights]
    nearest_error = total(nearest)
    if not math.isfinite(nearest_error):
        raise ValueError(f"The output of a layer is not finite with rounded weights: its error is {nearest_error}.")
    if nearest_error == 0.0 or not steps:
        return LearnedRoundings(nearest, nearest_error, nearest_error, 0.0)
    _descend(weights, error, num_batches, steps, strength, warmup, learning_rate, seed, nearest_error)
    learned = [weight.decided() for weight in weights]
    undecided = float(torch.stack([weight.undecided() for weight in weights]).mean())
    learned_error = total(learned)
    if learned_error < nearest_error:
        return LearnedRoundings(learned, nearest_error, learned_error, undecided)
    return LearnedRoundings(nearest, nearest_error, nearest_error, undecided)


@torch.enable_grad()
def _descend(
    weights: Sequence[SoftRounding],
    error: Callable[[Sequence[Tensor], int], Tensor],
    num_batches: int,
    steps: int,
    strength: float,
    warmup: float,
    learning_rate: float,
    seed: int,
    nearest_error: float,
) -> None:
    logits = [weight.logits for weight in weights]
    optimizer = torch.optim.Adam(logits, learning_rate)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for step in range(steps):
        order = order or torch.randperm(num_batches, generator=generator).tolist()
        shares = [weight.share_up() for weight in weights]
        values = [weight.soft_values(share) for weight, share in zip(weights, shares, strict=True)]
        loss = error(values, order.pop()) / nearest_error
        if step >= warmup * steps:
            beta = 20 - 18 * (step - warmup * steps) / ((1 - warmup) * steps)
            penalties = [weight.penalty(share, beta) for weight, share in zip(weights, shares, strict=True)]
            loss = loss + strength * torch.stack(penalties).mean()
        gradients = torch.autograd.grad(loss, logits, allow_unused=True, materialize_grads=True)
        for each, gradient in zip(logits, gradients, strict=True):
            each.grad = gradient
        optimizer.step()
