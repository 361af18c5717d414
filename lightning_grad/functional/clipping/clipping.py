"""Gradient clipping as functions of lists of gradients, in place and without a host sync.

Each takes the gradients that an optimizer is about to use::

    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    clip_norm_(gradients, max_norm=1.0)

What depends on the norms of earlier steps (AutoClip, ZClip) is in ``norm_statistics.py``, what changes gradients without
clipping them in ``conditioning.py``. The callbacks are in :mod:`lightning_grad.callbacks.clipping`. All functions also take
DTensors, which are clipped as the whole gradients would be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_grad.functional.gradients.tensor_lists import (
    by_device,
    is_sharded,
    multiply_,
    shards,
    stack_norms,
    tensor_norms,
    whole,
)

_EPS = 1e-6  # what torch adds to the norm it divides by


@torch.no_grad()
def total_norm(gradients: Sequence[Tensor], norm_type: float = 2.0, accurate: bool = False) -> Tensor:
    r"""Return the p-norm of all gradients, taken as one vector.

    .. math::
        \lVert g \rVert_p = \Bigl(\sum_i \lvert g_i \rvert^p\Bigr)^{1/p}

    Args:
        gradients: At least one tensor, each of any shape.
        norm_type: p, above 0; infinity for the largest magnitude.
        accurate: Add up half precision in float32; the default does so in the type of the gradients, as torch does.

    Returns:
        Tensor: The norm, a scalar on the device of the first gradient; the same on every rank for DTensors.

    Example:
        >>> total_norm([torch.tensor([3.0]), torch.tensor([4.0])])
        tensor(5.)
    """
    norms = tensor_norms(gradients, norm_type, accurate)
    sharded = [is_sharded(norm) for norm in norms]
    if any(sharded) and not all(sharded):
        norms = [whole(norm) for norm in norms]
    if len({norm.device for norm in norms}) > 1:
        norms = [norm.to(norms[0].device) for norm in norms]
    return whole(torch.linalg.vector_norm(torch.stack(norms), norm_type))


@torch.no_grad()
def clip_norm_(gradients: Sequence[Tensor], max_norm: float, norm_type: float = 2.0) -> Tensor:
    r"""Scale gradients together so that their norm is at most a constant.

    .. math::
        g \leftarrow g \cdot \min\Bigl(1, \frac{c}{\lVert g \rVert_p + 10^{-6}}\Bigr)

    Bitwise ``torch.nn.utils.clip_grad_norm_``. A norm that is not finite makes every gradient nan or zero, there and here.

    Args:
        gradients: At least one tensor, each of any shape; changed in place.
        max_norm: c, in the units of the norm.
        norm_type: p, above 0.

    Returns:
        Tensor: The norm before clipping, a scalar.

    Example:
        >>> g = [torch.tensor([3.0]), torch.tensor([4.0])]
        >>> clip_norm_(g, max_norm=1.0)
        tensor(5.)
        >>> g
        [tensor([0.6000]), tensor([0.8000])]

    References:
        Pascanu et al., "On the difficulty of training recurrent neural networks", 2013, arXiv 1211.5063, algorithm 1.
    """
    norm = total_norm(gradients, norm_type)
    if max_norm != math.inf:  # the quotient of two infinities would be no number
        multiply_(gradients, torch.clamp(max_norm / (norm + _EPS), max=1.0))
    return norm


@torch.no_grad()
def clip_to_threshold_(gradients: Sequence[Tensor], norm: Tensor, threshold: Tensor) -> Tensor:
    r"""Scale gradients whose norm is known to a threshold that is a tensor.

    .. math::
        g \leftarrow g \cdot \begin{cases} \tau / (n + 10^{-6}) & n > \tau \\ 1 & \text{else, or } n \text{ not finite}
        \end{cases}

    Args:
        gradients: At least one tensor; changed in place.
        norm: n, a scalar: their norm.
        threshold: :math:`\tau`, a scalar on the same device.

    Returns:
        Tensor: The coefficient, a scalar.

    Example:
        >>> g = [torch.tensor([3.0, 4.0])]
        >>> clip_to_threshold_(g, torch.tensor(5.0), torch.tensor(2.5))
        tensor(0.5000)
    """
    above = (norm > threshold) & norm.isfinite()
    coefficient = torch.where(above, threshold / (norm + _EPS), 1.0)
    multiply_(gradients, coefficient.to(norm.dtype))  # a product with float64 would leave the fast kernels
    return coefficient


@torch.no_grad()
def clip_value_(gradients: Sequence[Tensor], clip_value: float) -> None:
    r"""Clamp every entry of every gradient.

    .. math::
        g_i \leftarrow \max(-c, \min(c, g_i))

    Bitwise ``torch.nn.utils.clip_grad_value_``.

    Args:
        gradients: Tensors of any shape; changed in place.
        clip_value: c, at least 0.

    Example:
        >>> g = torch.tensor([-2.0, 0.5])
        >>> clip_value_([g], 1.0)
        >>> g
        tensor([-1.0000,  0.5000])
    """
    local = shards(gradients)
    torch._foreach_clamp_min_(local, -clip_value)
    torch._foreach_clamp_max_(local, clip_value)


def unit_norms(tensor: Tensor, output_dim: int = 0) -> Tensor:
    """Return the 2-norm of each unit of a weight: of all dimensions but one, or of a whole vector.

    A unit is a row of a Linear, a filter of a Conv. For layers that lay out their weights otherwise (ConvTranspose, whose
    outputs are in dimension 1; query, key and value packed in one weight) a unit is not one neuron, unless ``output_dim``
    says where the outputs are.

    Args:
        tensor: Any shape.
        output_dim: The dimension that counts the units.

    Returns:
        Tensor: (units, 1, ..., 1), or (1, units) with ``output_dim=1``; a scalar for a tensor of one dimension or none.

    Example:
        >>> unit_norms(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        tensor([[5.],
                [1.]])
    """
    dimensions = tuple(d for d in range(tensor.ndim) if d != output_dim) if tensor.ndim > 1 else None
    norms: Tensor = torch.linalg.vector_norm(tensor, dim=dimensions, keepdim=dimensions is not None)
    return norms


def _adaptive_coefficients(gradient_norms: Tensor, weight_norms: Tensor, ratio: float, eps: float) -> Tensor:
    limits = weight_norms.clamp(min=eps) * ratio
    return torch.where(gradient_norms < limits, 1.0, limits / gradient_norms.clamp(min=_EPS))


@torch.no_grad()
def clip_adaptively_(
    gradients: Sequence[Tensor],
    weights: Sequence[Tensor],
    ratio: float = 0.01,
    eps: float = 1e-3,
    output_dims: Sequence[int] | None = None,
) -> list[Tensor]:
    r"""Clip each unit's gradient by the norm of its weights (adaptive gradient clipping, AGC).

    .. math::
        G_i \leftarrow G_i \frac{m_i}{\lVert G_i \rVert} \text{ where } \lVert G_i \rVert > m_i, \quad
        m_i = \lambda \max(\lVert W_i \rVert, \epsilon)

    Args:
        gradients: G, tensors of any shape; changed in place.
        weights: W, of the same shapes. What a unit i is, says :func:`unit_norms`.
        ratio: :math:`\lambda`, the largest ratio of the norms.
        eps: :math:`\epsilon`, so that weights that are zero can leave zero.
        output_dims: For each weight the dimension that counts its units; ``None`` is the first of all.

    Returns:
        list: For each gradient the coefficients of its units, at most 1.

    Example:
        >>> g, w = torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [10.0, 0.0]])
        >>> _ = clip_adaptively_([g], [w], ratio=0.1)
        >>> g
        tensor([[0.0600, 0.0800],
                [0.0000, 1.0000]])

    References:
        Brock et al., "High-Performance Large-Scale Image Recognition Without Normalization", 2021, arXiv 2102.06171,
        equation 3.
    """
    coefficients: list[Any] = [None] * len(gradients)
    dims = output_dims or [0] * len(gradients)
    plain = [i for i, gradient in enumerate(gradients) if not is_sharded(gradient)]
    for positions in by_device([gradients[i] for i in plain]):
        chosen = [plain[i] for i in positions]
        # One vector of all units, so that the formula costs a handful of kernels rather than a handful a tensor.
        norms = [unit_norms(gradients[i], dims[i]) for i in chosen]
        gradient_norms = torch.cat([norm.flatten() for norm in norms])
        weight_norms = torch.cat([unit_norms(weights[i], dims[i]).flatten() for i in chosen])
        units = _adaptive_coefficients(gradient_norms, weight_norms, ratio, eps)
        found = torch.split(units, [norm.numel() for norm in norms])
        for i, norm, part in zip(chosen, norms, found, strict=True):
            coefficients[i] = part.view(norm.shape)
        torch._foreach_mul_([gradients[i] for i in chosen], [coefficients[i] for i in chosen])
    for i, gradient in enumerate(gradients):
        if is_sharded(gradient):
            norm, size = unit_norms(gradient, dims[i]), unit_norms(weights[i], dims[i])
            coefficients[i] = _adaptive_coefficients(norm, size, ratio, eps)
            gradient.mul_(coefficients[i])
    return coefficients


def _layer_norms(tensors: Sequence[Tensor], layers: Tensor, count: int) -> Tensor:
    squares = stack_norms(tensors).square()
    return squares.new_zeros(count).index_add_(0, layers, squares).sqrt()


def _multiply_layers_(gradients: Sequence[Tensor], coefficients: Tensor, layers: Tensor) -> None:
    local = shards(gradients)
    factors = coefficients[layers].unbind()
    torch._foreach_mul_(local, [factor.to(g.device) for factor, g in zip(factors, local, strict=True)])


@torch.no_grad()
def clip_layers_(gradients: Sequence[Tensor], layers: Tensor, max_norms: Tensor) -> tuple[Tensor, Tensor]:
    r"""Clip the gradient of each layer to a norm of its own.

    .. math::
        g_h \leftarrow g_h \cdot \min\Bigl(1, \frac{C_h}{\lVert g_h \rVert + 10^{-6}}\Bigr)

    :func:`layer_limits` shares out one C so that the total norm stays under it.

    Args:
        gradients: Tensors of any shape; changed in place.
        layers: (gradients,) int64: number h of the layer of each gradient, on the device of the first.
        max_norms: (layers,): C_h, on the same device.

    Returns:
        tuple: Norm of each layer before clipping, and coefficient of each, both (layers,).

    Example:
        >>> g = [torch.tensor([3.0]), torch.tensor([4.0]), torch.tensor([0.1])]
        >>> norms, _ = clip_layers_(g, torch.tensor([0, 0, 1]), torch.tensor([1.0, 1.0]))
        >>> norms
        tensor([5.0000, 0.1000])
        >>> g
        [tensor([0.6000]), tensor([0.8000]), tensor([0.1000])]

    References:
        Pelikan et al., "Federated Learning with Differential Privacy for End-to-End Speech Recognition", 2023,
        arXiv 2310.00098.
    """
    norms = _layer_norms(gradients, layers, len(max_norms))
    coefficients = torch.clamp(max_norms / (norms + _EPS), max=1.0)
    _multiply_layers_(gradients, coefficients, layers)
    return norms, coefficients


def layer_limits(sizes: Tensor, max_norm: float, weighted: bool = False) -> Tensor:
    r"""Share out one norm over layers.

    .. math::
        C_h = \frac{C}{\sqrt H} \quad\text{or, weighted,}\quad C_h = C \sqrt{\frac{d_h}{d}},
        \qquad \sqrt{\textstyle\sum_h C_h^2} = C

    Args:
        sizes: (layers,): d_h, the number of entries of each layer.
        max_norm: C.
        weighted: Whether large layers get more.

    Returns:
        Tensor: C_h, (layers,).

    Example:
        >>> layer_limits(torch.tensor([1, 3]), 2.0, weighted=True)
        tensor([1.0000, 1.7321])
    """
    shares = sizes / sizes.sum() if weighted else torch.full_like(sizes, 1 / len(sizes), dtype=torch.float32)
    return max_norm * shares.sqrt()


@torch.no_grad()
def normalize_layers_(
    gradients: Sequence[Tensor],
    weights: Sequence[Tensor],
    layers: Tensor,
    count: int,
    coefficient: float = 1.0,
    max_ratio: float | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Give each layer's gradient the norm of its weights, times a constant (the trust ratio of LARS).

    .. math::
        g_h \leftarrow g_h \cdot \min\Bigl(r, \eta \frac{\lVert W_h \rVert}{\lVert g_h \rVert}\Bigr)

    A layer whose weights or gradient are all zero, or not finite, is left as it is.

    Args:
        gradients: g, tensors of any shape; changed in place.
        weights: W, of the same shapes.
        layers: (gradients,) int64: number h of the layer of each gradient, on the device of the first.
        count: Number of layers.
        coefficient: :math:`\eta`, the trust coefficient.
        max_ratio: r, the largest factor; ``None`` sets no bound.

    Returns:
        tuple: Norm of each layer before, and factor of each, both (layers,).

    Example:
        >>> g, w = [torch.tensor([3.0, 4.0])], [torch.tensor([0.0, 2.0])]
        >>> _ = normalize_layers_(g, w, torch.tensor([0]), 1)
        >>> g
        [tensor([1.2000, 1.6000])]

    References:
        You et al., "Large Batch Training of Convolutional Networks", 2017, arXiv 1708.03888, equation 6; Pelikan et al.,
        2023, arXiv 2310.00098, use it on federated gradients.
    """
    norms, sizes = _layer_norms(gradients, layers, count), _layer_norms(weights, layers, count)
    ratios = coefficient * sizes / norms
    factors = ratios if max_ratio is None else ratios.clamp(max=max_ratio)
    factors = torch.where((ratios > 0) & ratios.isfinite(), factors, 1.0)
    _multiply_layers_(gradients, factors, layers)
    return norms, factors


@torch.no_grad()
def clip_spikes_(gradients: Sequence[Tensor], second_moments: Sequence[Tensor], threshold: float = 5000.0) -> None:
    r"""Clip each entry that stands far above its own past (spike-aware clipping, SPAM).

    .. math::
        g_i \leftarrow \operatorname{sign}(g_i) \sqrt{\theta v_i} \quad\text{where}\quad g_i^2 > \theta v_i, \; v_i > 0

    An entry with :math:`v_i = 0` has no past and is left as it is; the published code sets it to 0, and as a gradient of 0
    leaves v at 0, such an entry stays frozen for as long as it is clipped.

    Args:
        gradients: g, tensors of any shape; changed in place.
        second_moments: v, of the same shapes: the running mean of squares of an Adam-like optimizer (``exp_avg_sq``),
            not corrected for bias, as it stands before the step.
        threshold: :math:`\theta`.

    Example:
        >>> g = torch.tensor([9.0, -9.0, 0.5, 9.0])
        >>> clip_spikes_([g], [torch.tensor([1.0, 1.0, 1.0, 0.0])], threshold=4.0)
        >>> g
        tensor([ 2.0000, -2.0000,  0.5000,  9.0000])

    References:
        Huang et al., "SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training", 2025, arXiv 2501.06842,
        algorithm 1.
    """
    for gradient, moment in zip(shards(gradients), shards(second_moments), strict=True):
        limit = (moment * threshold).sqrt_().masked_fill_(~(moment > 0), torch.inf).to(gradient.dtype)
        torch.minimum(gradient, limit, out=gradient)
        torch.maximum(gradient, limit.neg_(), out=gradient)
