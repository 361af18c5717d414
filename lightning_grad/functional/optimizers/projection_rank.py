"""The rank of a projected gradient, for all optimizers that project."""

from collections.abc import Sequence


def rank_within(shape: Sequence[int], rank: int) -> int:
    """Return the rank that a projection of a matrix can have at most.

    Example:
        >>> rank_within((8, 64), 16), rank_within((64, 32), 16)
        (8, 16)
    """
    return min(rank, *shape)
