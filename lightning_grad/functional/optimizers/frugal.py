"""FRUGAL: Adam for a block of rows that moves through the matrices, the sign of the gradient for the rest."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_grad.functional.optimizers._moments import update_moments_


def active_rows(shapes: Sequence[Sequence[int]], density: float, start: int = 0) -> list[tuple[int, int]]:
    r"""Return the rows of each matrix that are in the block of Adam.

    The rows of all matrices stand in one line, closed to a ring. The block is a stretch of it with at most ``density``
    of all entries, so it holds whole matrices, and parts of the first and the last one.

    Args:
        shapes: (rows, columns) of each matrix.
        density: Largest share of the entries in the block, from 0 to 1.
        start: Number of the first row of the block, counted over all matrices.

    Returns:
        list: (first, count) of each matrix. Rows continue at row 0 after the last one.

    Example:
        >>> active_rows([(4, 2), (2, 4)], 0.5, start=1)
        [(1, 3), (0, 0)]
        >>> active_rows([(4, 2), (2, 4)], 0.5, start=5)
        [(0, 2), (1, 1)]

    References:
        Zmushko et al., "FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for Scalable Training", ICML
        2025, arXiv 2411.07837. The released code takes whole matrices, so it needs many of equal size to meet the
        density.
    """
    place, first = _place_of(shapes, start)
    others = [*range(place + 1, len(shapes)), *range(place)]
    stretches = [(place, first, shapes[place][0]), *((at, 0, shapes[at][0]) for at in others), (place, 0, first)]
    room = int(density * sum(rows * columns for rows, columns in shapes))
    counts = [0] * len(shapes)
    for at, begin, end in stretches:
        count = min(end - begin, room // shapes[at][1])
        counts[at] += count
        room -= count * shapes[at][1]
        if count < end - begin:
            break
    starts = [first if at == place and counts[at] < rows else 0 for at, (rows, _) in enumerate(shapes)]
    return list(zip(starts, counts, strict=True))


def _place_of(shapes: Sequence[Sequence[int]], row: int) -> tuple[int, int]:
    """Return the matrix of a row that is counted over all matrices, and its number there."""
    row %= sum(rows for rows, _ in shapes)
    for place, (rows, _) in enumerate(shapes):
        if row < rows:
            return place, row
        row -= rows
    raise ValueError("shapes must hold at least one row.")


def split_rows(matrix: Tensor, first: int, count: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return views of the rows in the block, in its order, and views of the others.

    Example:
        >>> split_rows(torch.tensor([[1], [2], [3]]), first=2, count=2)
        ([tensor([[3]]), tensor([[1]])], [tensor([[2]])])
    """
    over = first + count - len(matrix)
    if over > 0:
        return [matrix[first:], matrix[:over]], [matrix[over:first]]
    return [matrix[first : first + count]], [matrix[:first], matrix[first + count :]]


@torch.no_grad()
def frugal_(
    weight: Tensor,
    gradient: Tensor,
    rows: tuple[int, int],
    mean: Tensor | None,
    square: Tensor | None,
    step: int,
    lr: float,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    inactive_lr_scale: float = 1.0,
) -> None:
    r"""Make one step of FRUGAL with one matrix, in place.

    .. math::
        w \leftarrow (1 - \eta \lambda) w, \qquad w_B \leftarrow w_B - \eta \, \mathrm{Adam}(g_B), \qquad
        w_{\bar B} \leftarrow w_{\bar B} - \eta \, s \, \mathrm{sign}(g_{\bar B})

    Args:
        weight: w, (rows, columns).
        gradient: g, of the same shape.
        rows: (first, count) of the block B, from :func:`active_rows`.
        mean: First moment of the rows of the block, (count, columns). None if the block has no row of this matrix.
        square: Second moment, of the same shape.
        step: Number of this step since the moments were zero, from 1.
        lr: :math:`\eta`.
        betas: Decays of the moments.
        eps: Added to the root of the second moment.
        weight_decay: :math:`\lambda`, decoupled.
        inactive_lr_scale: s, factor of the learning rate outside the block.

    Example:
        >>> w, m, v = torch.ones(2, 1), torch.zeros(1, 1), torch.zeros(1, 1)
        >>> frugal_(w, torch.tensor([[0.5], [-3.0]]), (0, 1), m, v, step=1, lr=0.25, eps=0.0, inactive_lr_scale=2.0)
        >>> w
        tensor([[0.7500],
                [1.5000]])

    References:
        Zmushko et al., ICML 2025, arXiv 2411.07837, algorithm 1.
    """
    if weight_decay:
        weight.mul_(1 - lr * weight_decay)
    active, rest = split_rows(weight, *rows)
    of_active, of_rest = split_rows(gradient, *rows)
    for part, its_gradient in zip(rest, of_rest, strict=True):
        part.add_(its_gradient.sign(), alpha=-lr * inactive_lr_scale)
    if mean is None or square is None:
        return
    sizes, factor = [len(part) for part in active], -lr / (1 - betas[0] ** step)
    for part, its_gradient, m, v in zip(
        active, of_active, torch.split(mean, sizes), torch.split(square, sizes), strict=True
    ):
        part.addcdiv_(m, update_moments_(m, v, its_gradient, step, betas, eps), value=factor)
