"""Select the k entries of a vector with the largest magnitudes, for gradient compression.

NaN counts as the largest magnitude, as in :func:`torch.topk`, so a broken gradient is sent and becomes visible. Indices
are in no particular order. Equal tensors and arguments give equal indices.
"""

import math

import torch
from torch import Tensor

from lightning_grad.functional.choices import check_choice

SELECTORS = ("auto", "exact", "sampled", "chunk")
AUTO_SAMPLED_FROM = 1_000_000
AUTO_BLOCKS_FROM = 65_536
AUTO_BLOCKS_SHARE = 500  # blocks are faster than a sample while at most one entry in this many is selected

_LOWER = 0.8
_ROUNDS = 10
_DEVIATIONS = 3.0
_BLOCK_SIZE, _LEAST_BLOCK_SIZE = 64, 4
_BLOCKS_PER_SELECTED = 8  # at least, so most blocks are dropped
_PART = 1 << 16  # entries whose magnitudes stay in the cache until the largest of each block are known
_BLOCK = 1 << 19  # entries whose magnitudes stay in the cache until they have been compared
_ALL_BELOW = 0x0101010101010101  # eight bools that are true


def select_largest(values: Tensor, k: int, selector: str = "auto", start: int = 0) -> Tensor:
    """Select the k entries with the largest magnitudes, with the given algorithm.

    ``"auto"`` uses :func:`select_blocks` if n is at least :data:`AUTO_BLOCKS_FROM` and k at most 0.2 % of n. Otherwise it
    is ``"exact"`` below :data:`AUTO_SAMPLED_FROM` entries, and ``"sampled"`` from there on.

    Args:
        values: (n,), any float dtype; may be a strided view.
        k: Number of entries to select, 1 to n.
        selector: Algorithm: ``"auto"``, ``"exact"``, ``"sampled"`` or ``"chunk"``.
        start: Offset of the sample, used by ``"sampled"`` only.

    Returns:
        Tensor: int64 indices: k of them, or at most k for ``"chunk"``.

    Raises:
        ValueError: If the selector is unknown, k is outside 1 to n, or values is not a vector.

    Example:
        >>> select_largest(torch.tensor([0.1, -3.0, 2.0, 0.5]), 2).sort().values
        tensor([1, 2])
    """
    check_choice(selector, SELECTORS, "selector")
    if selector == "chunk":
        return select_chunk(values, k)
    if selector == "auto" and values.numel() >= max(AUTO_BLOCKS_FROM, AUTO_BLOCKS_SHARE * k):
        return select_blocks(values, k)
    if selector == "sampled" or (selector == "auto" and values.numel() >= AUTO_SAMPLED_FROM):
        return select_sampled(values, k, start)
    return select_exact(values, k)


def select_exact(values: Tensor, k: int) -> Tensor:
    r"""Select the k entries with the largest magnitudes with ``torch.topk`` over all entries.

    .. math::
        S = \operatorname{top}_k |v|

    It does not synchronize with the host.

    Args:
        values: v, (n,), any float dtype.
        k: Number of entries to select, 1 to n.

    Returns:
        Tensor: (k,) int64: indices of the selected entries.

    Raises:
        ValueError: If k is outside 1 to n, or values is not a vector.

    Example:
        >>> select_exact(torch.tensor([0.1, -3.0, 2.0, 0.5]), 1)
        tensor([1])
    """
    _check(values, k)
    return torch.topk(values.abs(), k, sorted=False).indices


def select_blocks(values: Tensor, k: int) -> Tensor:
    r"""Select the k entries with the largest magnitudes, with the largest magnitude of each block of entries.

    .. math::
        S = \operatorname{top}_k \Big\{ |v_i| : i \in \bigcup_{j \in T} B_j \Big\}, \qquad
        T = \operatorname{top}_k \max_{i \in B_j} |v_i|

    where the :math:`B_j` are blocks of up to 64 consecutive entries. An entry outside of the k best blocks is at most
    as large as the largest entry of each of them, so these blocks contain k entries that no other entry exceeds. Fewer
    than 4 entries per block would not pay; k above n / 32 therefore searches all entries.

    It does not synchronize with the host, and takes the same time for any values.

    Args:
        values: v, (n,), any float dtype.
        k: Number of entries to select, 1 to n.

    Returns:
        Tensor: (k,) int64: indices of the selected entries.

    Raises:
        ValueError: If k is outside 1 to n, or values is not a vector.

    Example:
        >>> v = torch.linspace(-1, 1, 10_001)
        >>> select_blocks(v, 4).sort().values
        tensor([    0,     1,  9999, 10000])
    """
    _check(values, k)
    size = _block_size(values.numel(), k)
    if size < _LEAST_BLOCK_SIZE:
        return select_exact(values, k)
    values = values.detach().contiguous()
    whole = values.numel() // size * size
    maxima, blocks = torch.topk(_block_maxima(values[:whole], size), k, sorted=False)
    # The entries after the last whole block are candidates in any case.
    candidates = torch.cat([values[:whole].view(-1, size)[blocks].view(-1), values[whole:]]).abs_()
    if values.is_cpu:  # top-k of hardly more than k entries; on a GPU, counting them would wait for the device
        near = candidates.lt(maxima.min()).logical_not_().nonzero().view(-1)  # all of them if a maximum is NaN
        chosen = near[torch.topk(candidates[near], k, sorted=False).indices]
    else:
        chosen = torch.topk(candidates, k, sorted=False).indices
    places = torch.cat([blocks, torch.full_like(blocks[:1], whole // size)])
    block = torch.div(chosen, size, rounding_mode="floor").clamp_(max=k)
    return places[block] * size + (chosen - block * size)


def select_sampled(values: Tensor, k: int, start: int = 0, share: float = 0.01) -> Tensor:
    r"""Select the k entries with the largest magnitudes, with a threshold estimated from a sample.

    .. math::
        S = \operatorname{top}_k \{|v_i| : |v_i| \ge \tau\}, \qquad
        \tau = |v|_{(r)} \text{ of the sample}, \qquad r = \lceil \mu + 3 \sqrt\mu \rceil, \quad \mu = k m / n

    The sample is every s-th entry, m in total, and contains about :math:`\mu` of the k largest. An odd s avoids
    sampling the same columns of rows with even length. The rank r exceeds its expectation by three standard deviations,
    so one pass nearly always finds k or more entries, and the top k of these are the top k of all. If it finds fewer,
    :math:`\tau` is multiplied by 0.8, up to ten times; after that, or if more than half of the entries reach
    :math:`\tau`, :func:`select_blocks` searches all entries. The sample therefore affects only the time: the result is
    always the k largest entries.

    The released code is less strict. It uses :math:`r = \lceil \mu \rceil`, sends between 0.8 k and k entries
    unchanged, and truncates between k and 1.3 k in the order of the indices. Only above 1.3 k does it compute the top
    k.

    Each pass synchronizes with the host twice, to get the number of entries found. Usually there is one pass.

    Args:
        values: v, (n,), any float dtype.
        k: Number of entries to select, 1 to n.
        start: Offset of the sample, any integer, taken modulo the stride.
        share: Fraction of the entries to sample, above 0 and at most 1.
            For small k it is raised until the sample contains 2 of the k largest on average. If that needs more than a
            third of the entries, all entries are searched instead.

    Returns:
        Tensor: (k,) int64: indices of the selected entries.

    Raises:
        ValueError: If k is outside 1 to n, share is outside 0 to 1, or values is not a vector.

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
        raise ValueError(f"share must be above 0 and at most 1, a fraction of the entries; got {share}.")
    threshold = _sampled_threshold(values, k, start, share)
    if threshold is None:
        return select_exact(values, k)
    # A threshold of zero would find every zero entry. It is kept above zero; blocks handle the zeros.
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
    return select_blocks(values, k)


def select_chunk(values: Tensor, k: int) -> Tensor:
    r"""Select the entry with the largest magnitude in each of at most k chunks of equal size.

    .. math::
        S = \Big\{ \operatorname{argmax}_{i \in C_j} |v_i| \Big\}, \qquad
        C_j = \{jc, \dots, \min(jc + c, n) - 1\}, \quad c = \lceil n / k \rceil

    The chunks cover all entries; the last may be shorter. There are :math:`\lceil n / c \rceil` of them, which is well
    below k if k is more than half of n. The selected entries are not the k largest: a chunk without a large entry still
    selects one. There is no host sync.

    Args:
        values: v, (n,), any float dtype.
        k: Maximum number of entries to select, 1 to n.

    Returns:
        Tensor: :math:`(\lceil n / c \rceil,)` int64: indices of the selected entries, ascending.

    Raises:
        ValueError: If k is outside 1 to n, or values is not a vector.

    Example:
        >>> select_chunk(torch.tensor([0.1, -3.0, 2.0, 0.5, 0.7]), 2)
        tensor([1, 4])
    """
    _check(values, k)
    n = values.numel()
    size = -(-n // k)
    full = n // size
    rows = values[: full * size].reshape(full, size)
    # max, because argmax is slower on the CPU.
    winners = [part.abs().max(1).indices for part in torch.split(rows, max(_block(values) // size, 1))]
    if full * size < n:
        winners.append(values[full * size :].abs().argmax().view(1))
    return torch.cat(winners) + torch.arange(0, n, size, device=values.device)


def _check(values: Tensor, k: int) -> None:
    if values.ndim != 1:
        raise ValueError(f"values must be a vector, (n,); got shape {tuple(values.shape)}. Flatten them first.")
    if not 1 <= k <= values.numel():
        raise ValueError(f"k must be between 1 and the number of entries, {values.numel()}; got {k}.")


def _block_size(n: int, k: int) -> int:
    """Return a power of two, up to 64, that leaves at least eight blocks for each selected entry."""
    return 1 << max(min(_BLOCK_SIZE, n // (_BLOCKS_PER_SELECTED * k)), 1).bit_length() - 1


def _block_maxima(values: Tensor, size: int) -> Tensor:
    """Return the largest magnitude of each block of a contiguous vector; NaN if the block contains NaN."""
    if not values.is_cpu:
        return values.abs().view(-1, size).amax(1)
    maxima, work = values.new_empty(len(values) // size), values.new_empty(min(_PART, len(values)))
    for part, out in zip(torch.split(values, _PART), torch.split(maxima, _PART // size), strict=True):
        torch.amax(torch.abs(part, out=work[: len(part)]).view(-1, size), 1, out=out)
    return maxima


def _block(values: Tensor) -> int:
    # On a GPU a single launch is faster.
    return _BLOCK if values.device.type == "cpu" else values.numel()


def _sampled_threshold(values: Tensor, k: int, start: int, share: float) -> Tensor | None:
    """Estimate from a sample a magnitude that slightly more than k entries reach; None if sampling does not pay."""
    n = values.numel()
    stride = n // max(math.ceil(n * share), math.ceil(2 * n / k))
    stride -= 1 - stride % 2
    if stride <= 1:
        return None
    sample = values[start % stride :: stride].abs()
    expected = len(sample) * k / n
    rank = math.ceil(expected + _DEVIATIONS * math.sqrt(expected))
    # The last entry of a sorted top-k, because its minimum is NaN if any entry is.
    return torch.topk(sample, rank).values[-1] if rank < len(sample) else None


def _indices_from(values: Tensor, threshold: Tensor) -> Tensor:
    """Return the indices, ascending, of magnitudes that are not below the threshold, including NaN.

    The search for the few hits reads words of eight comparisons, which is several times faster than ``nonzero`` on all.
    """
    n = values.numel()
    below = torch.ones(-(-n // 8) * 8, dtype=torch.bool, device=values.device)
    for part, out in zip(torch.split(values, _block(values)), torch.split(below[:n], _block(values)), strict=True):
        torch.lt(part.abs(), threshold, out=out)
    words = (below.view(torch.int64) != _ALL_BELOW).nonzero().flatten()
    if 16 * len(words) > n:  # many hits: the search by words does not pay
        return below.logical_not_().nonzero().flatten()
    word, place = below.view(-1, 8)[words].logical_not_().nonzero().unbind(1)
    return words[word] * 8 + place
