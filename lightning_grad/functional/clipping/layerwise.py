"""Clip or normalize the gradient of each layer separately."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_grad.functional.clipping.norms import EPS
from lightning_grad.functional.gradients.tensor_lists import read_flags, shards, stack_norms


def layer_norms(tensors: Sequence[Tensor], layers: Tensor, count: int) -> Tensor:
    """Return the norm of each layer, (layers,), from the layer index of each tensor."""
    squares = stack_norms(tensors).square()
    return squares.new_zeros(count).index_add_(0, layers, squares).sqrt()


def multiply_layers_(gradients: Sequence[Tensor], coefficients: Tensor, layers: Tensor) -> None:
    """Multiply each gradient by the coefficient of its layer, in place; on a CPU a coefficient of 1 costs nothing."""
    local, factors = shards(gradients), coefficients[layers]
    scaled, parts = read_flags(factors != 1.0), factors.unbind()
    chosen = [i for i, g in enumerate(local) if scaled is None or scaled[i] or g.is_complex()]
    if chosen:
        torch._foreach_mul_([local[i] for i in chosen], [parts[i].to(local[i].device) for i in chosen])


@torch.no_grad()
def clip_layers_(gradients: Sequence[Tensor], layers: Tensor, max_norms: Tensor) -> tuple[Tensor, Tensor]:
    r"""Clip the gradient of each layer to its own maximum norm.

    .. math::
        g_h \leftarrow g_h \cdot \min\Bigl(1, \frac{C_h}{\lVert g_h \rVert + 10^{-6}}\Bigr)

    :func:`layer_limits` computes :math:`C_h` that bound the total norm by one C.

    Args:
        gradients: Tensors of any shape; changed in place.
        layers: (gradients,) int64: layer index h of each gradient, on the device of the first gradient.
        max_norms: (layers,): C_h, on the same device.

    Returns:
        tuple: Norms of the layers before clipping, and their coefficients, both (layers,).

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
    norms = layer_norms(gradients, layers, len(max_norms))
    coefficients = torch.clamp(max_norms / (norms + EPS), max=1.0).masked_fill_(max_norms.isinf(), 1.0)
    multiply_layers_(gradients, coefficients, layers)
    return norms, coefficients


def layer_limits(sizes: Tensor, max_norm: float, weighted: bool = False) -> Tensor:
    r"""Split one maximum norm into limits for the layers.

    .. math::
        C_h = \frac{C}{\sqrt H} \quad\text{or, weighted,}\quad C_h = C \sqrt{\frac{d_h}{d}},
        \qquad \sqrt{\textstyle\sum_h C_h^2} = C

    Args:
        sizes: (layers,): d_h, the number of entries of each layer.
        max_norm: C, the bound on the total norm.
        weighted: Give larger layers larger limits.

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
    trust_coefficient: float = 1.0,
    max_ratio: float | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Scale each layer's gradient to the norm of its weights times a constant (the trust ratio of LARS).

    .. math::
        g_h \leftarrow g_h \cdot \min\Bigl(r, \eta \frac{\lVert W_h \rVert}{\lVert g_h \rVert}\Bigr)

    A layer is not changed if its weights or its gradient are all zero or not finite.

    Args:
        gradients: g, tensors of any shape; changed in place.
        weights: W, of the same shapes.
        layers: (gradients,) int64: layer index h of each gradient, on the device of the first gradient.
        count: Number of layers.
        trust_coefficient: :math:`\eta`, the trust coefficient.
        max_ratio: r, the largest factor; ``None`` sets no bound.

    Returns:
        tuple: Gradient norms of the layers before scaling, and their factors, both (layers,).

    Example:
        >>> g, w = [torch.tensor([3.0, 4.0])], [torch.tensor([0.0, 2.0])]
        >>> _ = normalize_layers_(g, w, torch.tensor([0]), 1)
        >>> g
        [tensor([1.2000, 1.6000])]

    References:
        You et al., "Large Batch Training of Convolutional Networks", 2017, arXiv 1708.03888, equation 6; Pelikan et
        al., 2023, arXiv 2310.00098, use it on federated gradients.
    """
    norms, sizes = layer_norms(gradients, layers, count), layer_norms(weights, layers, count)
    ratios = trust_coefficient * sizes / norms
    factors = ratios if max_ratio is None else ratios.clamp(max=max_ratio)
    factors = torch.where((ratios > 0) & ratios.isfinite(), factors, 1.0)
    multiply_layers_(gradients, factors, layers)
    return norms, factors
