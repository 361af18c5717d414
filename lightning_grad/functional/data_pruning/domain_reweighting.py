"""Weights of domains by the alignment of their gradients with that of a target (Fan, Grangier and Ablin, 2024)."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def gradient_alignments(
    gradients: Iterable[Sequence[Tensor]], target: Sequence[Tensor], normalize: bool = True
) -> Tensor:
    r"""Return how well the gradient of each domain agrees with the gradient of a target.

    .. math::
        a_i = \frac{\langle g_i, g^* \rangle}{\lVert g^* \rVert \sqrt{\frac 1 k \sum_j \lVert g_j \rVert^2}}

    A step along -g_i lowers the loss of the target in proportion to a_i. Without ``normalize``, a_i is the inner product
    alone. The denominator is the same for all domains, so it changes the unit of a, not the order or the ratios: a does
    not depend on the scale of the loss, and a domain with larger gradients still counts for more.

    Args:
        gradients: Gradients g_i of k domains, each a list of real tensors; read one by one.
        target: Gradient g* of the target, a list of tensors in the same order.
        normalize: Whether to divide by the norms.

    Returns:
        Tensor: a, (k,), float64 on the device of the target, computed without a host sync; 0 for a domain whose
        gradient is not finite, and for all if a norm is 0.

    Raises:
        ValueError: If there are no domains, or a gradient has another number of tensors than the target.

    Example:
        >>> target = [torch.tensor([3.0, 4.0])]
        >>> gradients = [[torch.tensor([6.0, 8.0])], [torch.tensor([4.0, -3.0])], [torch.tensor([-3.0, -4.0])]]
        >>> gradient_alignments(gradients, target, normalize=False)
        tensor([ 50.,   0., -25.], dtype=torch.float64)
        >>> gradient_alignments(gradients, target)
        tensor([ 1.4142,  0.0000, -0.7071], dtype=torch.float64)

    References:
        Fan, Grangier and Ablin, "Dynamic Gradient Alignment for Online Data Mixing", 2024, arXiv 2410.02498. It has the
        inner product; ``normalize`` is ours.
    """
    products, squares = list[Tensor](), list[Tensor]()
    for gradient in gradients:
        if len(gradient) != len(target):
            raise ValueError(
                f"Each gradient must have one tensor for each of the {len(target)} of the target; domain {len(products)} "
                f"has {len(gradient)}."
            )
        products.append(_inner(gradient, target))
        squares.append(_inner(gradient, gradient))
        del gradient  # else it would exist while the next one is made
    if not products:
        raise ValueError("gradients must have the gradient of at least one domain; got none.")
    found, sizes = torch.stack(products), torch.stack(squares)
    known = found.isfinite() & sizes.isfinite()
    if normalize:
        mean = torch.where(known, sizes, 0.0).sum() / known.sum().clamp(min=1)
        found = found / (_inner(target, target) * mean).sqrt()
    return torch.where(known & found.isfinite(), found, 0.0)


def _inner(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    # Sums of millions of float32 products are inexact. Apple's GPU has no float64.
    wide = torch.float32 if other and other[0].device.type == "mps" else torch.float64
    parts = []
    for a, b in zip(one, other, strict=True):
        kind = torch.promote_types(torch.float32, torch.promote_types(a.dtype, b.dtype))
        parts.append((a.detach().to(kind) * b.detach().to(kind)).sum(dtype=wide))
    return torch.stack(parts).sum()


def update_domain_weights(
    weights: Tensor, alignments: Tensor, step_size: float, shares: Tensor | None = None, floor: float = 0.0
) -> Tensor:
    r"""Return the weights of domains after one step of Dynamic Gradient Alignment.

    .. math::
        \hat\alpha_i = \frac{\alpha_i e^{\eta a_i}}{\sum_j \alpha_j e^{\eta a_j}}, \qquad
        \alpha_i \leftarrow (1 - \epsilon)\, \hat\alpha_i + \epsilon\, s_i

    Args:
        weights: alpha, (k,), at least 0, with sum 1.
        alignments: a, (k,); see :func:`gradient_alignments`.
        step_size: eta, at least 0.
        shares: s, (k,), shares of the domains in the data. Default: 1 / k each.
        floor: epsilon, from 0 to 1. A domain never has less than epsilon times its share.

    Returns:
        Tensor: The new weights, (k,), with sum 1.

    Raises:
        ValueError: If the tensors are not vectors of one length, or a number is outside its range.

    Example:
        >>> update_domain_weights(torch.tensor([0.5, 0.5]), torch.tensor([1.0, -1.0]), step_size=0.5)
        tensor([0.7311, 0.2689])
        >>> update_domain_weights(torch.tensor([0.5, 0.5]), torch.tensor([1.0, -1.0]), step_size=100.0, floor=0.1)
        tensor([0.9500, 0.0500])

    References:
        Fan, Grangier and Ablin, 2024, arXiv 2410.02498. The floor is ours: without it, a domain whose weight has become
        tiny needs as many steps to return.
    """
    given = {"weights": weights, "alignments": alignments, "shares": weights if shares is None else shares}
    for name, values in given.items():
        if values.shape != (len(weights),):
            raise ValueError(f"{name} must have one entry for each domain, (k,); got shape {tuple(values.shape)}.")
    if not step_size >= 0.0:
        raise ValueError(f"step_size must be at least 0; got {step_size}.")
    if not 0.0 <= floor <= 1.0:
        raise ValueError(f"floor must be from 0 to 1; got {floor}.")
    moved = torch.softmax(weights.log() + step_size * alignments.to(weights), 0)
    rest = torch.full_like(weights, 1.0 / len(weights)) if shares is None else shares.to(weights)
    return (1.0 - floor) * moved + floor * rest
