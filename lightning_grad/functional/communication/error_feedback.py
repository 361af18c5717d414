r"""What a compressor did not send, it keeps and sends later: the algebra of error feedback and of momentum correction."""

import torch
from torch import Tensor


def accumulate_residual_(
    residual: Tensor, gradient: Tensor, velocity: Tensor | None = None, momentum: float = 0.0, nesterov: bool = False
) -> Tensor:
    r"""Add a gradient to what has not been sent, through its momentum if it has one, in place.

    .. math::
        u \leftarrow m u + g, \quad v \leftarrow v + u
        \qquad \text{(Nesterov: } v \leftarrow v + g + m u \text{)}

    With :math:`u` the velocity, :math:`m` the momentum, :math:`g` the local gradient and :math:`v` the residual.
    Momentum is accumulated *before* selection, so that an entry which waits for many steps arrives with the momentum
    that it would have had: this is the momentum correction of Deep Gradient Compression. Without a velocity it is
    plain error feedback, :math:`v \leftarrow v + g`. Nesterov's form is that of ``torch.optim.SGD``: the paper's,
    which keeps :math:`m u` in place of :math:`u`, is the same while the momentum stays the same, and not under a
    schedule of it.

    Args:
        residual: What has not been sent, any shape, changed in place.
        gradient: The gradient of this rank, same number of entries, in any floating type.
        velocity: Momentum of this rank, same shape as ``residual``, changed in place; ``None`` for none.
        momentum: Share of the velocity that stays, at least 0.
        nesterov: Whether to look ahead, as ``torch.optim.SGD(nesterov=True)`` does.

    Returns:
        Tensor: ``residual``.

    Example:
        >>> v, u = torch.zeros(2), torch.tensor([1.0, 0.0])
        >>> accumulate_residual_(v, torch.tensor([1.0, 2.0]), u, momentum=0.5)
        tensor([1.5000, 2.0000])

    References:
        - Lin et al. (2018), Deep Gradient Compression, arXiv 1712.01887, equations 4 to 6 and appendix B.
    """
    if velocity is None:
        return residual.add_(gradient)
    velocity.mul_(momentum).add_(gradient)
    if nesterov:
        return residual.add_(gradient).add_(velocity, alpha=momentum)
    return residual.add_(velocity)


def as_sent(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return values in the type in which they are sent, finite ones clamped to its range.

    What rounding and clamping take away stays in the residual, as :func:`remove_sent_` subtracts what was sent.

    Args:
        values: Any shape.
        dtype: A floating type.

    Example:
        >>> as_sent(torch.tensor([1e6, 0.5]), torch.float16)
        tensor([6.5504e+04, 5.0000e-01], dtype=torch.float16)
    """
    if torch.finfo(dtype).max < torch.finfo(values.dtype).max:
        most = torch.finfo(dtype).max
        values = values.clamp(-most, most)
    return values.to(dtype)


def remove_sent_(
    residual: Tensor, indices: Tensor, sent: Tensor, velocity: Tensor | None = None, arrived: Tensor | None = None
) -> Tensor:
    r"""Take what was sent out of the residual, and its momentum out of the velocity, in place.

    .. math::
        v_i \leftarrow v_i - s_i, \quad u_i \leftarrow 0 \quad \text{for every sent } i

    Stopping the momentum of sent entries is the momentum factor masking of Deep Gradient Compression: it keeps a stale
    direction from being sent again.

    Args:
        residual: Flat, (n), changed in place.
        indices: Sent entries, (k), int64, each once.
        sent: Their values as they were sent, (k).
        velocity: Momentum to stop, (n), changed in place; ``None`` leaves it.
        arrived: A 0-dimensional bool tensor: false takes nothing out, without a sync with the host. ``None`` is true.

    Returns:
        Tensor: ``residual``.

    Example:
        >>> v, u = torch.tensor([1.0, 5.0]), torch.tensor([3.0, 4.0])
        >>> remove_sent_(v, torch.tensor([1]), torch.tensor([5.0]), u)
        tensor([1., 0.])
        >>> u
        tensor([3., 0.])

    References:
        - Lin et al. (2018), Deep Gradient Compression, arXiv 1712.01887, section 3.2 and equation 7.
    """
    values = sent.to(residual.dtype)
    kept = torch.zeros_like(values)
    if arrived is not None:
        values = torch.where(arrived, values, 0.0)
        kept = kept if velocity is None else torch.where(arrived, 0.0, velocity[indices])
    residual.index_add_(0, indices, values, alpha=-1)
    if velocity is not None:
        velocity.index_copy_(0, indices, kept)
    return residual
