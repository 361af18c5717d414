"""When a gradient norm is a spike: far above the usual one, or not finite."""

import math
import statistics
from collections.abc import Sequence


def is_spike(norm: float, recent: Sequence[float], factor: float = 10.0, least: int = 8) -> bool:
    r"""Return True if a gradient norm is not finite, or far above the median of the last ones.

    .. math::
        n_t > c \cdot \operatorname{median}(n_{t-k}, \ldots, n_{t-1})

    The median hardly moves with a few large norms, so a spike does not hide the next one.

    Args:
        norm: :math:`n_t`.
        recent: Norms of the last steps.
        factor: c.
        least: Smallest number of norms for a comparison; with fewer, only a norm that is not finite is a spike.

    Example:
        >>> usual = [1.0, 1.2, 0.9, 1.1]
        >>> is_spike(8.0, usual, least=4), is_spike(11.0, usual, least=4), is_spike(float("nan"), [])
        (False, True, True)
    """
    if not math.isfinite(norm):
        return True
    return len(recent) >= least and norm > factor * statistics.median(recent)
