r"""Low-rank adapters (LoRA) and their start from a gradient (LoRA-GA).

An adapter adds :math:`s B A` to a frozen weight :math:`W`: A is (r, in), B is (out, r), and W is (out, in), a kernel
(out, in, ...), or with ``is_transposed`` (in, out).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_STABLE_GAMMA = 16.0


def lora_scale(rank: int, alpha: float, rank_stabilized: bool = False) -> float:
    r"""Return the factor s of an adapter.

    .. math::
        s = \frac{\alpha}{r} \quad \text{or, rank-stabilized,} \quad s = \frac{\alpha}{\sqrt r}

    Args:
        rank: Rank r of the adapter.
        alpha: Strength of the adapter.
        rank_stabilized: Divide by the square root, so gradients do not shrink with the rank (rsLoRA).

    Example:
        >>> lora_scale(4, 8.0), lora_scale(4, 8.0, rank_stabilized=True)
        (2.0, 4.0)

    References:
        Hu et al., "LoRA", 2021, arXiv 2106.09685, section 4.1. Kalajdzievski, "A Rank Stabilization Scaling Factor for
        Fine-Tuning with LoRA", 2023, arXiv 2312.03732.
    """
    return alpha / (math.sqrt(rank) if rank_stabilized else rank)


def merge_lora(weight: Tensor, a: Tensor, b: Tensor, scale: float, is_transposed: bool = False) -> Tensor:
    r"""Return a weight with its adapter, :math:`W + s B A`.

    Args:
        weight: W, of shape (out, in) or (out, in, ...); with ``is_transposed``, (in, out).
        a: A, of shape (r, in); for a kernel, (r, in * ...).
        b: B, of shape (out, r).
        scale: Factor s.
        is_transposed: Whether the layer multiplies by W in place of its transpose, as ``Conv1D`` of GPT-2 does.

    Returns:
        Tensor: A new tensor of the shape and type of ``weight``.

    Example:
        >>> merge_lora(torch.zeros(2, 3), torch.ones(1, 3), torch.tensor([[1.0], [2.0]]), scale=0.5)
        tensor([[0.5000, 0.5000, 0.5000],
                [1.0000, 1.0000, 1.0000]])
    """
    product = a.t() @ b.t() if is_transposed else b @ a
    return torch.add(weight, product.to(weight.dtype).reshape(weight.shape), alpha=scale)


def lora_norm(a: Tensor, b: Tensor) -> Tensor:
    r"""Return the Frobenius norm of B A without computing the product.

    .. math::
        \lVert B A \rVert^2 = \sum_{ij} (B^T B)_{ij} (A A^T)_{ij}

    Args:
        a: A, of shape (r, in).
        b: B, of shape (out, r).

    Returns:
        Tensor: A scalar.

    Example:
        >>> lora_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0], [2.0]]))
        tensor(10.)
    """
    return ((b.t() @ b) * (a @ a.t())).sum().clamp_min(0).sqrt()


def lora_rank(shape: torch.Size | tuple[int, ...], rank: int, from_gradient: bool = False) -> int:
    """Return the largest possible rank of an adapter up to a given one.

    Args:
        shape: Shape of the weight, (out, in) or (out, in, ...).
        rank: Wanted rank.
        from_gradient: Whether A and B start from different singular vectors of the gradient, so twice the rank must
            fit.

    Example:
        >>> lora_rank((10, 64), 8), lora_rank((10, 64), 8, from_gradient=True)
        (8, 5)
    """
    largest = min(shape[0], math.prod(shape[1:]))
    return min(rank, largest // 2 if from_gradient else largest)


def lora_ga_factors(gradient: Tensor, rank: int, gamma: float = _STABLE_GAMMA) -> tuple[Tensor, Tensor]:
    r"""Return factors whose first step is the best approximation of the step of full fine-tuning (LoRA-GA).

    .. math::
        G = U S V^T, \qquad A = c \, V_{:, 1:r}^T, \qquad B = c \, U_{:, r+1:2r}, \qquad
        c = \frac{m^{1/4}}{\sqrt \gamma}

    The first step of gradient descent on A and B then changes :math:`s B A`, up to second order, by a multiple of G
    projected to its 2r largest singular values. The cosine to G is :math:`\sqrt{\sum_{i \le 2r} S_i^2 / \sum_i S_i^2}`,
    the largest that a change of rank 2r has. The factors do not depend on the scale of G. To keep the function of the
    layer, subtract :math:`s B A` from the weight.

    Args:
        gradient: G, the gradient of the loss with respect to the weight, of shape (m, in) with m outputs; the mean over
            some batches.
        rank: Rank r.
        gamma: Divisor of the factors' size (16 in the paper, "stable").

    Returns:
        tuple: A of shape (r, in) and B of shape (m, r), in the type of the gradient.

    Raises:
        ValueError: If ``2 * rank`` exceeds the smaller side of the gradient, or the gradient is not finite.

    Example:
        >>> a, b = lora_ga_factors(torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.5])), rank=1)
        >>> a.abs(), b.abs().t()
        (tensor([[0.3536, 0.0000, 0.0000, 0.0000]]), tensor([[0.0000, 0.3536, 0.0000, 0.0000]]))

    References:
        Wang et al., "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", NeurIPS 2024, arXiv 2407.05000,
        section 3, and its released code for the roles of U and V.
    """
    if 2 * rank > min(gradient.shape):
        raise ValueError(
            f"2 * rank must be at most the smaller side of the gradient, {min(gradient.shape)}; got rank={rank}."
        )
    if not torch.isfinite(gradient).all():
        raise ValueError("gradient must be finite; got nan or inf.")
    exact = gradient if gradient.dtype == torch.float64 else gradient.float()
    # Its scale does not matter, and squares of small numbers would underflow.
    u, _, vh = torch.linalg.svd(exact / exact.abs().max().clamp_min(1e-300), full_matrices=False)
    size = len(gradient) ** 0.25 / math.sqrt(gamma)
    return (size * vh[:rank]).to(gradient.dtype), (size * u[:, rank : 2 * rank]).to(gradient.dtype)
