r"""Error feedback and momentum correction: a compressor keeps the unsent part, and sends it later."""

import torch
from torch import Tensor


def accumulate_residual_(
    residual: Tensor, gradient: Tensor, velocity: Tensor | None = None, momentum: float = 0.0, nesterov: bool = False
) -> Tensor:
    r"""Add a gradient to the residual of unsent values in place, optionally through a momentum.

    .. math::
        u \leftarrow m u + g, \quad v \leftarrow v + u
        \qquad \text{(Nesterov: } v \leftarrow v + g + m u \text{)}

    where :math:`u` is the velocity, :math:`m` the momentum, :math:`g` the local gradient and :math:`v` the residual.
    Momentum is accumulated *before* selection, so an entry that is sent after many steps includes the momentum that it
    would have had: the momentum correction of Deep Gradient Compression. Without a velocity this is plain error
    feedback, :math:`v \leftarrow v + g`. Nesterov momentum follows ``torch.optim.SGD``. The paper stores :math:`m u` in
    place of :math:`u`, which is equivalent only if the momentum is constant.

    Args:
        residual: Unsent values, any shape, changed in place.
        gradient: The gradient of this rank, same number of entries, any floating dtype.
        velocity: Momentum buffer, shaped like ``residual``, changed in place; ``None`` for none.
        momentum: Factor of the velocity, at least 0.
        nesterov: Use Nesterov momentum, as ``torch.optim.SGD(nesterov=True)`` does.

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
    """Convert values to the dtype of the message, clamped to its range.

    :func:`remove_sent_` subtracts the converted values, so errors of rounding and clamping stay in the residual.

    Args:
        values: Any shape.
        dtype: A floating dtype.

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
    r"""Subtract sent values from the residual and zero their momentum, in place.

    .. math::
        v_i \leftarrow v_i - s_i, \quad u_i \leftarrow 0 \quad \text{for every sent } i

    Zeroing the momentum of sent entries is the momentum factor masking of Deep Gradient Compression. It prevents stale
    directions from being sent again.

    Args:
        residual: Flat, (n), changed in place.
        indices: Indices of the sent entries, (k), int64, distinct.
        sent: Their values as sent, (k).
        velocity: Momentum buffer, (n), changed in place; ``None`` for none.
        arrived: Scalar bool tensor; False changes nothing, without a host sync. ``None`` is True.

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
