"""The cost of communication in bytes, and the density of messages over a run."""

import math
from collections.abc import Sequence

PAPER_WARMUP = (0.25, 0.0625, 0.015625, 0.004)
"""Densities of the first epochs in the paper (section 3.3), before 0.001."""

RELEASED_WARMUP = (0.31622776601683794, 0.1, 0.03162277660168379, 0.01, 0.003162277660168379)
"""Densities of the first epochs in the released configuration: powers of 0.316, reaching 0.001 after five epochs."""


def warmup_density(position: int, warmup: Sequence[float], density: float) -> float:
    """Return the fraction of entries to send at a position of the warm-up, at least the final density.

    Args:
        position: Warm-up periods (for example epochs) completed.
        warmup: Density of each period of the warm-up.
        density: Final density.

    Example:
        >>> [warmup_density(epoch, [0.25, 0.0625], 0.1) for epoch in range(3)]
        [0.25, 0.1, 0.1]
    """
    return max(warmup[position], density) if position < len(warmup) else density


def kept_count(numel: int, density: float) -> int:
    """Return how many entries of a tensor to send: density times size, rounded up, at least one.

    Example:
        >>> kept_count(1000, 0.001), kept_count(1001, 0.001), kept_count(10, 0.001)
        (1, 2, 1)
    """
    # Rounding errors must not add an entry: a product within 1e-12 of an integer counts as that integer.
    exact = numel * density
    return max(1, round(exact) if math.isclose(exact, round(exact), rel_tol=1e-12) else math.ceil(exact))


def all_reduce_bytes(numel: int, ranks: int, value_bytes: int = 4) -> float:
    r"""Return the bytes that each rank sends in a ring all-reduce, :math:`2 \frac{N - 1}{N} b n`.

    Args:
        numel: Number of entries :math:`n`.
        ranks: Number of ranks :math:`N`.
        value_bytes: Bytes per entry :math:`b`.

    Example:
        >>> all_reduce_bytes(1000, ranks=4)
        6000.0
    """
    return 2 * (ranks - 1) / ranks * value_bytes * numel


def all_gather_bytes(message: float, ranks: int) -> float:
    r"""Return the bytes that each rank sends in a ring all-gather, :math:`N - 1` times its message.

    Args:
        message: Size of each rank's message in bytes.
        ranks: Number of ranks :math:`N`.

    Example:
        >>> all_gather_bytes(8, ranks=4)
        24
    """
    return (ranks - 1) * message


def sparse_wire_gain(density: float, ranks: int, pair_bytes: int = 8) -> float:
    r"""Return the factor by which sparse messages reduce the traffic of dense float32 gradients.

    .. math::
        \frac{2 \frac{N - 1}{N} \, 4 n}{(N - 1) \, \rho n \, b} = \frac{8}{N \rho b}

    The cost of an all-gather grows with the number of ranks :math:`N`, the cost of an all-reduce does not. At density
    :math:`\rho` = 0.001 and :math:`b` = 8 bytes per pair the factor is 500 with 2 ranks, 62 with 16, and at most 1 with
    1000 or more.

    Args:
        density: Fraction of entries that is sent.
        ranks: Number of ranks.
        pair_bytes: Bytes of an index and its value.

    Example:
        >>> [round(sparse_wire_gain(0.001, ranks)) for ranks in (2, 16, 64)]
        [500, 62, 16]
    """
    return 8 / (ranks * density * pair_bytes)
