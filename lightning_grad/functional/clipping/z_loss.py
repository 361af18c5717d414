"""Z-loss: a penalty that keeps the normalizer of a softmax near one."""

import torch
from torch import Tensor


def squared_log_normalizers(logits: Tensor, dim: int = -1) -> Tensor:
    r"""Return the square of the log-normalizer of each softmax, in float32 or float64.

    .. math::
        \log^2 Z_p = \Bigl( \log \sum_k e^{x_{pk}} \Bigr)^2

    Args:
        logits: x; any shape, with the classes k in dimension ``dim``.
        dim: Dimension of the classes.

    Returns:
        Tensor: The shape of ``logits`` without ``dim``.

    Example:
        >>> squared_log_normalizers(torch.zeros(2, 4))
        tensor([1.9218, 1.9218])
    """
    # In float16 a square overflows for logits above 255.
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.logsumexp(dim).square()


def z_loss(logits: Tensor, coefficient: float = 1e-4, valid: Tensor | None = None, dim: int = -1) -> Tensor:
    r"""Return the z-loss of a batch, to be added to its cross-entropy.

    .. math::
        c \, \frac{1}{|V|} \sum_{p \in V} \log^2 Z_p, \qquad Z_p = \sum_k e^{x_{pk}}

    Cross-entropy does not change if a constant is added to all logits of a position, so nothing stops the logits from
    drifting. The z-loss pulls :math:`\log Z` to zero.

    Args:
        logits: x; any shape, with the classes k in dimension ``dim``.
        coefficient: c, at least 0 (1e-4 in both papers).
        valid: V, bool, the shape of ``logits`` without ``dim``: the positions that count. Default: all.
        dim: Dimension of the classes.

    Returns:
        Tensor: A scalar with a graph, in float32 or float64; 0 if no position counts.

    Raises:
        ValueError: If the coefficient is negative, or ``valid`` has another shape.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0], [5.0, 5.0]])
        >>> z_loss(logits, coefficient=1.0), z_loss(logits, coefficient=1.0, valid=torch.tensor([True, False]))
        (tensor(16.4462), tensor(0.4805))

    References:
        Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways", 2022, arXiv 2204.02311, section 5. Wortsman
        et al., "Small-scale proxies for large-scale Transformer training instabilities", 2023, arXiv 2309.14322,
        section 3.1.2.
    """
    if not coefficient >= 0.0:
        raise ValueError(f"coefficient must be at least 0; got {coefficient}.")
    squares = squared_log_normalizers(logits, dim)
    if valid is None:
        return coefficient * squares.mean()
    if valid.shape != squares.shape:
        raise ValueError(
            f"valid must have one entry for each position, {tuple(squares.shape)}; got {tuple(valid.shape)}."
        )
    return coefficient * (squares * valid).sum() / valid.sum().clamp(min=1)
