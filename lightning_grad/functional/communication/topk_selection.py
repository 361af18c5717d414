"""The k entries of a vector with the largest magnitudes: what gradient compression sends.

NaN counts as the largest magnitude of all, as in :func:`torch.topk`, so that a broken gradient is sent and seen. Indices
come in no particular order. The same tensor and the same arguments give the same indices.
"""

import math

import torch
from torch import Tensor

from lightning_grad.functional.choices import check_choice

SELECTORS = ("auto", "exact", "sampled", "chunk")
AUTO_SAMPLED_FROM = 1_000_000

_LOWER = 0.8
_ROUNDS = 10
_DEVIATIONS = 3.0
_BLOCK = 1 << 19  # entries whose magnitudes stay in the cache until they have been looked at
_ALL_BELOW = 0x0101010101010101  # eight bools that are true


def select_largest(values: Tensor, k: int, selector: str = "auto", start: int = 0) -> Tensor:
    """Select the k entries with the largest magnitudes, by the selector of a name.

    ``"auto"`` is ``"exact"`` below :data:`AUTO_SAMPLED_FROM` entries and ``"sampled"`` from there on.

    Args:
        values: (n,): any float dtype; a strided view will do.
        k: How many entries to select, 1 to n.
        selector: Way to select: auto, exact, sampled or chunk.
        start: Offset of the sample, which only ``"sampled"`` takes.

    Returns:
        Tensor: int64 indices: k of them, or at most k for ``"chunk"``.

    Raises:
        ValueError: If the selector is unknown, k lies outside 1 to n, or the values are no vector.

    Example:
        >>> select_largest(torch.tensor([0.1, -3.0, 2.0, 0.5]), 2).sort().values
        tensor([1, 2])
    """
    check_choice(selector, SELECTORS, "selector")
    if selector == "chunk":
        return select_chunk(values, k)
    if selector == "sampled" or (selector == "auto" and values.numel() >= AUTO_SAMPLED_FROM):
        return select_sampled(values, k, start)
    return select_exact(values, k)


def select_exact(values: Tensor, k: int) -> Tensor:
    r"""Select the k entries with the largest magnitudes by looking at all of them.

    .. math::
        S = \operatorname{top}_k |v|

    The host is not waited for.

    Args:
        values: v, (n,): any float dtype.
        k: How many entries to select, 1 to n.

    Returns:
        Tensor: (k,) int64: indices of the selected entries.

    Raises:
        ValueError: If k lies outside 1 to n, or the values are no vector.

    Example:
        >>> select_exact(torch.tensor([0.1, -3.0, 2.0, 0.5]), 1)
        tensor([1])
    """
    _check(values, k)
    return torch.topk(values.abs(), k, sorted=False).indices


def select_sampled(values: Tensor, k: int, start: int = 0, share: float = 0.01) -> Tensor:
    r"""Select the k entries with the largest magnitudes among those above a threshold, which a sample tells.

    .. math::
        S = \operatorname{top}_k \{|v_i| : |v_i| \ge \tau\}, \qquad
        \tau = |v|_{(r)} \text{ of the sample}, \qquad r = \lceil \mu + 3 \sqrt\mu \rceil, \quad \mu = k m / n

    The sample is every s-th entry, m of them, and about :math:`\mu` of the k largest are in it. With s odd it does not
    fall into step with rows of even length. The rank r lies three standard deviations below the k-th largest, so that
    one pass nearly always finds k or more, and the top k among them are the top k of all. Should it find fewer,
    :math:`\tau` is lowered to 0.8 of itself, at most ten times, and after that all entries are looked at. So the sample
    decides about the time, never about the magnitudes selected: it is always exactly k entries, and the largest.

    That is stricter than the released code, which takes :math:`r = \lceil \mu \rceil`, sends any number from 0.8 k to k as
    it is, and cuts one from k to 1.3 k in the order of the indices. Only above 1.3 k it looks for the top k.

    The host waits twice in each pass, for how many were found; one pass is the rule.

    Args:
        values: v, (n,): any float dtype.
        k: How many entries to select, 1 to n.
        start: Offset of the sample, any integer; the place counts modulo the stride.
        share: Share of the entries that is sampled, above 0 and at most 1; more where k is small, so that 2 of the k largest
            are in the sample on average. A sample of more than a third of the entries is not drawn, all are looked at.

    Returns:
        Tensor: (k,) int64: indices of the selected entries.

    Raises:
        ValueError: If k lies outside 1 to n, the share outside 0 to 1, or the values are no vector.

    Example:
        >>> v = torch.linspace(-1, 1, 10_001)
        >>> select_sampled(v, 4).sort().values
        tensor([    0,     1,  9999, 10000])

    References:
        Lin et al., "Deep Gradient Compression", 2018, arXiv 1712.01887, section 3 (sampling 0.1 to 1 % and the
        hierarchical selection); share, odd stride, 0.8 and ten rounds from the released code.
    """
    _check(values, k)
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share must lie above 0 and at most at 1, a share of the entries; got {share}.")
    threshold = _sampled_threshold(values, k, start, share)
    if threshold is None:
        return select_exact(values, k)
    # Zeros tie in their thousands and would all be found: they are left to the exact selection.
    least = torch.finfo(values.dtype).tiny * torch.finfo(values.dtype).eps
    threshold = threshold.clamp(min=least)
    for _ in range(_ROUNDS + 1):
        found = _indices_from(values, threshold)
        if 2 * len(found) > values.numel():
            break
        if len(found) >= k:
            return found[select_exact(values[found], k)]
        if bool(threshold <= least):
            break
        threshold = (threshold * _LOWER).clamp(min=least)
    return select_exact(values, k)


def select_chunk(values: Tensor, k: int) -> Tensor:
    r"""Select the entry with the largest magnitude of each of at most k chunks of equal size.

    .. math::
        S = \Big\{ \operatorname{argmax}_{i \in C_j} |v_i| \Big\}, \qquad
        C_j = \{jc, \dots, \min(jc + c, n) - 1\}, \quad c = \lceil n / k \rceil

    Every entry lies in a chunk. The last may be shorter, and there are :math:`\lceil n / c \rceil` of them, which is well
    below k where k is more than half of n. What is selected are not the k largest: a chunk without a large entry still sends
    one. The host is not waited for.

    Args:
        values: v, (n,): any float dtype.
        k: How many entries to select at most, 1 to n.

    Returns:
        Tensor: :math:`(\lceil n / c \rceil,)` int64: indices of the selected entries, rising.

    Raises:
        ValueError: If k lies outside 1 to n, or the values are no vector.

    Example:
        >>> select_chunk(torch.tensor([0.1, -3.0, 2.0, 0.5, 0.7]), 2)
        tensor([1, 4])
    """
    _check(values, k)
    n = values.numel()
    size = -(-n // k)
    full = n // size
    rows = values[: full * size].reshape(full, size)
    # max and not argmax, which is slower on the CPU.
    winners = [part.abs().max(1).indices for part in torch.split(rows, max(_block(values) // size, 1))]
    if full * size < n:
        winners.append(values[full * size :].abs().argmax().view(1))
    return torch.cat(winners) + torch.arange(0, n, size, device=values.device)


def _check(values: Tensor, k: int) -> None:
    if values.ndim != 1:
        raise ValueError(f"values must be a vector, (n,); got the shape {tuple(values.shape)}. Flatten them first.")
    if not 1 <= k <= values.numel():
        raise ValueError(f"k must be between 1 and the number of entries, {values.numel()}; got {k}.")


def _block(values: Tensor) -> int:
    # A GPU is better off with a single launch.
    return _BLOCK if values.device.type == "cpu" else values.numel()


def _sampled_threshold(values: Tensor, k: int, start: int, share: float) -> Tensor | None:
    """Return a magnitude that k entries or a few more reach, as far as a sample can tell, or None if it is not worth it."""
    n = values.numel()
    stride = n // max(math.ceil(n * share), math.ceil(2 * n / k))
    stride -= 1 - stride % 2
    if stride <= 1:
        return None
    sample = values[start % stride :: stride].abs()
    expected = len(sample) * k / n
    rank = math.ceil(expected + _DEVIATIONS * math.sqrt(expected))
    # The last of a sorted top-k and not its minimum, which is NaN as soon as one of them is.
    return torch.topk(sample, rank).values[-1] if rank < len(sample) else None


def _indices_from(values: Tensor, threshold: Tensor) -> Tensor:
    """Return where the magnitude is not below the threshold, NaN among them, rising.

    The few hits are looked for in words of eight comparisons, which is several times faster than ``nonzero`` on each.
    """
    n = values.numel()
    below = torch.ones(-(-n // 8) * 8, dtype=torch.bool, device=values.device)
    for part, out in zip(torch.split(values, _block(values)), torch.split(below[:n], _block(values)), strict=True):
        torch.lt(part.abs(), threshold, out=out)
    words = (below.view(torch.int64) != _ALL_BELOW).nonzero().flatten()
    if 16 * len(words) > n:  # not so few
        return below.logical_not_().nonzero().flatten()
    word, place = below.view(-1, 8)[words].logical_not_().nonzero().unbind(1)
    return words[word] * 8 + place
