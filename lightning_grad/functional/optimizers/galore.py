"""GaLore: Adam in a low-rank part of the gradient, spanned by its singular vectors; and the savings of Q-GaLore."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_grad.functional.optimizers._moments import update_moments_

_LEVELS = 15  # of 4 bits, above the lowest


def gradient_basis(gradient: Tensor, rank: int) -> Tensor:
    r"""Return the singular vectors of a gradient on its smaller side, those with the largest singular values first.

    .. math::
        G = U \Sigma V^\top, \qquad B = V_{:, :r} \text{ if } n \ge k, \text{ else } U_{:, :r}

    Args:
        gradient: G, (n, k).
        rank: r, at most min(n, k).

    Returns:
        Tensor: B, (min(n, k), r), in the type of the gradient. The decomposition is computed in float32 at least.

    Example:
        >>> gradient_basis(torch.tensor([[0.0, 2.0], [0.0, 0.0], [1.0, 0.0]]), rank=1).abs()
        tensor([[0.],
                [1.]])

    References:
        Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", ICML 2024, arXiv
        2403.03507, equations 12 and 13; one side only, as in its section 4.2.
    """
    exact = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    left, _, right = torch.linalg.svd(exact, full_matrices=False)
    basis: Tensor = right[:rank].mT if len(gradient) >= len(gradient.mT) else left[:, :rank]
    return basis.to(gradient.dtype).contiguous()


@torch.no_grad()
def galore_adamw_(
    weight: Tensor,
    gradient: Tensor,
    basis: Tensor,
    mean: Tensor,
    square: Tensor,
    step: int,
    lr: float,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    scale: float = 0.25,
) -> None:
    r"""Make one step of GaLore with one matrix, in place.

    .. math::
        R = G B, \qquad W \leftarrow (1 - \eta \lambda) W - \eta \, \alpha \, \mathrm{Adam}(R) \, B^\top

    A matrix with more columns than rows is transposed first.

    Args:
        weight: W, (n, k).
        gradient: G, of the same shape.
        basis: B, (min(n, k), r), from :func:`gradient_basis`.
        mean: First moment of R, (max(n, k), r).
        square: Second moment, of the same shape.
        step: Number of this step, from 1.
        lr: :math:`\eta`.
        betas: Decays of the moments.
        eps: Added to the root of the second moment.
        weight_decay: :math:`\lambda`, decoupled.
        scale: :math:`\alpha`, factor of the update.

    Example:
        >>> w, m, v = torch.zeros(2, 2), torch.zeros(2, 1), torch.zeros(2, 1)
        >>> g, first = torch.tensor([[0.5, 7.0], [-3.0, 7.0]]), torch.tensor([[1.0], [0.0]])
        >>> galore_adamw_(w, g, first, m, v, step=1, lr=1.0, eps=0.0)
        >>> w[:, 0], bool((w[:, 1] == 0).all())
        (tensor([-0.2500,  0.2500]), True)

    References:
        Zhao et al., ICML 2024, arXiv 2403.03507, algorithm 2. The moments are kept when the basis changes, and eps is
        added after the bias correction, as in ``torch.optim.AdamW``; the released code adds it before.
    """
    is_tall = len(weight) >= len(weight.mT)
    low = (gradient if is_tall else gradient.mT) @ basis
    update = mean / update_moments_(mean, square, low, step, betas, eps) @ basis.mT
    if weight_decay:
        weight.mul_(1 - lr * weight_decay)
    weight.add_(update if is_tall else update.mT, alpha=-lr * scale / (1 - betas[0] ** step))


def is_settled(cosines: Sequence[float], threshold: float = 0.4, queue: int = 5) -> bool:
    """Return True if the first direction of a gradient has hardly turned lately, so its basis can be kept longer.

    Args:
        cosines: Absolute cosines between the first directions of successive bases, the latest last.
        threshold: Smallest mean of the last cosines.
        queue: Number of cosines to average. With fewer, the answer is False.

    Example:
        >>> is_settled([0.1, 0.5, 0.5, 0.5, 0.5]), is_settled([0.1, 0.5, 0.5, 0.5, 0.3]), is_settled([1.0])
        (True, False, False)

    References:
        Zhang et al., "Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive Low-Rank Gradients", 2024,
        arXiv 2407.08296, section 3.2; threshold and queue of the released code. Cosines are absolute here, because the
        sign of a singular vector is arbitrary.
    """
    last = cosines[-queue:]
    return len(last) == queue and sum(last) / queue >= threshold


def pack_int4(values: Tensor, group_size: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    r"""Round values to 16 levels in groups, and pack two of them into a byte.

    .. math::
        q = \mathrm{round}\left(\frac{x - \min x}{s}\right), \qquad s = \frac{\max x - \min x}{15}

    Args:
        values: x, of any shape.
        group_size: Number of successive values that share s and the minimum; even.

    Returns:
        tuple: Bytes (groups, group_size / 2) as uint8, the steps s (groups, 1), and the minima (groups, 1). The last
        group is filled up with zeros.

    Example:
        >>> packed, step, low = pack_int4(torch.tensor([[0.0, 1.5, 0.75]]), group_size=4)
        >>> packed.dtype, packed.shape, unpack_int4(packed, step, low, (1, 3))
        (torch.uint8, torch.Size([1, 2]), tensor([[0.0000, 1.5000, 0.8000]]))

    References:
        Zhang et al., arXiv 2407.08296, section 3.3; groups of 256 as in the released code, whose zero point is an
        integer.
    """
    flat = values.to(torch.promote_types(values.dtype, torch.float32)).flatten()
    rows = torch.nn.functional.pad(flat, (0, -len(flat) % group_size)).view(-1, group_size)
    low = rows.amin(1, keepdim=True)
    step = (rows.amax(1, keepdim=True) - low) / _LEVELS
    levels = ((rows - low) / step.clamp(min=torch.finfo(step.dtype).tiny)).round().to(torch.uint8)
    return levels[:, ::2] | (levels[:, 1::2] << 4), step, low


def unpack_int4(packed: Tensor, step: Tensor, low: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the rounded values of :func:`pack_int4`; each differs from the original by at most half of its step.

    Args:
        packed: (groups, group_size / 2) bytes.
        step: (groups, 1).
        low: (groups, 1).
        shape: Shape of the result.
    """
    levels = torch.stack([packed & _LEVELS, packed >> 4], -1).flatten(1)
    return (levels * step + low).flatten()[: math.prod(shape)].view(*shape)
