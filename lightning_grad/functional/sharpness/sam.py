"""The perturbation of sharpness-aware minimization (SAM), plain and adaptive (ASAM)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_grad.functional.gradients.tensor_lists import multiply_, read_flags, shards
from lightning_grad.functional.gradients.total_norm import total_norm


@torch.no_grad()
def ascend_(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    rho: float | Sequence[float] = 0.05,
    adaptive: bool = False,
    eta: float = 0.01,
) -> Tensor:
    r"""Move weights up their gradient by a length of rho, in place.

    .. math::
        w \leftarrow w + \rho \, \frac{T^2 g}{\lVert T g \rVert_2}, \qquad
        T = \begin{cases} \operatorname{diag}(\lvert w \rvert + \eta) & \text{adaptive, and } w \text{ has two or more
        dimensions} \\ I & \text{else} \end{cases}

    The norm is that of all gradients together, summed in float32 or float64. If it is zero or not finite, no weight
    moves.

    Args:
        weights: One or more tensors of any shape; changed in place.
        gradients: Gradient of the loss with respect to each weight, of the same shapes. They are overwritten with what
            was added to the weights, to save memory.
        rho: :math:`\rho`, one length for all weights or one for each.
        adaptive: Measure the length relative to the size of the weights, so it does not depend on their scale.
        eta: :math:`\eta`, keeps T above zero where a weight is zero.

    Returns:
        Tensor: :math:`\lVert T g \rVert_2`, a scalar.

    Example:
        >>> w, g = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
        >>> ascend_([w], [g], rho=0.5)
        tensor(5.)
        >>> w
        tensor([1.3000, 2.4000])

    References:
        Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR 2021, arXiv
        2010.01412, equation 2. Kwon et al., "ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of
        Deep Neural Networks", ICML 2021, arXiv 2102.11600, equation 5 with T as in section 3.
    """
    own_weights, own_gradients = shards(weights), shards(gradients)
    stretches = _stretches(own_weights, eta) if adaptive else []
    _stretch_(own_gradients, stretches)
    norm = total_norm(gradients, accurate=True)
    moves = norm.isfinite() & (norm > 0)
    flags = read_flags(moves)
    if flags is None or flags == b"\0":  # zero times infinity is nan
        for gradient in own_gradients:
            gradient.masked_fill_(~moves.to(gradient.device), 0.0)
    if flags == b"\0":
        return norm
    _stretch_(own_gradients, stretches)
    lengths = [rho] * len(own_gradients) if isinstance(rho, (int, float)) else rho
    for length in dict.fromkeys(lengths):
        chosen = [gradient for gradient, own in zip(own_gradients, lengths, strict=True) if own == length]
        multiply_(chosen, torch.where(moves, length / norm, 0.0))
    torch._foreach_add_(own_weights, own_gradients)
    return norm


def _stretches(weights: Sequence[Tensor], eta: float) -> list[Tensor | None]:
    """Return T of each weight; ``None`` for 1."""
    return [weight.abs().add_(eta) if weight.ndim > 1 else None for weight in weights]


def _stretch_(gradients: Sequence[Tensor], stretches: Sequence[Tensor | None]) -> None:
    pairs = [(g, stretch) for g, stretch in zip(gradients, stretches, strict=False) if stretch is not None]
    if pairs:
        torch._foreach_mul_([g for g, _ in pairs], [stretch for _, stretch in pairs])
