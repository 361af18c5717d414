"""Join several tensors into one of shape (B, ...), so that they can be attacked together, and split it again."""

from collections.abc import Sequence

import torch
from torch import Tensor


def joined(pieces: Sequence[Tensor], are_samples: bool) -> Tensor:
    """Return all pieces as one tensor; smaller ones are padded by repeating their last values.

    Args:
        pieces: Tensors with the same number of dimensions.
        are_samples: Whether each piece is a sample rather than a batch.

    Example:
        >>> joined([torch.ones(1, 2), torch.full((1, 1), 2.0)], True).tolist()
        [[[1.0, 1.0]], [[2.0, 2.0]]]
    """
    rows = [piece.unsqueeze(0) for piece in pieces] if are_samples else list(pieces)
    size = tuple(max(lengths) for lengths in zip(*(row.shape[1:] for row in rows), strict=True))
    return torch.cat([_filled_up(row, size) for row in rows])


def parted(whole: Tensor, pieces: Sequence[Tensor], are_samples: bool) -> list[Tensor]:
    """Split a joined tensor into views with the shapes of the pieces.

    Example:
        >>> pieces = [torch.ones(1, 2), torch.full((1, 1), 2.0)]
        >>> [part.tolist() for part in parted(joined(pieces, True) + 1, pieces, True)]
        [[[2.0, 2.0]], [[3.0]]]
    """
    parts, begin = [], 0
    for piece in pieces:
        shape = (1, *piece.shape) if are_samples else tuple(piece.shape)
        rows = whole.narrow(0, begin, shape[0])[(slice(None), *map(slice, shape[1:]))]
        parts.append(rows.squeeze(0) if are_samples else rows)
        begin += shape[0]
    return parts


def support_of(pieces: Sequence[Tensor], are_samples: bool) -> Tensor | None:
    """Return a mask of a joined tensor, 1 for values and 0 for padding; ``None`` if there is no padding.

    Example:
        >>> support_of([torch.ones(1, 2), torch.ones(1, 1)], True).tolist()
        [[[1.0, 1.0]], [[1.0, 0.0]]]
    """
    if len({piece.shape if are_samples else piece.shape[1:] for piece in pieces}) == 1:
        return None
    support = torch.zeros_like(joined(pieces, are_samples), requires_grad=False)
    for part in parted(support, pieces, are_samples):
        part.fill_(1.0)
    return support


def _filled_up(row: Tensor, size: tuple[int, ...]) -> Tensor:
    if not row.numel():
        return row.new_zeros((len(row), *size))
    # Pad with values of the same channel: any other value might lie outside the bounds.
    for dim, length in enumerate(size, 1):
        if row.shape[dim] < length:
            row = row.index_select(dim, torch.arange(length, device=row.device).clamp(max=row.shape[dim] - 1))
    return row
