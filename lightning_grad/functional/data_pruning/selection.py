"""Select samples by score: the hardest, the easiest, random ones, or some of every stratum.

A higher score means a harder sample. Everything is computed on the CPU with seeded generators, so every rank selects
the same samples.
"""

import math

import torch
from torch import Tensor

from lightning_grad.functional.choices import check_choice
from lightning_grad.functional.data_pruning.dataset_quantization import bins_of
from lightning_grad.functional.shuffling import shuffled


def _whole(share: float, total: int) -> int:
    # 0.29 * 100 is 28.999999999999996, but must count as 29.
    return math.floor(share * total * (1 + 1e-12))


def _ranking(scores: Tensor, keep: str, offset: int) -> Tensor:
    """Return all positions, those to keep first and the hardest ``offset`` last; ties stay in their order."""
    missing = scores.isnan()
    unscored, scored = missing.nonzero().flatten(), (~missing).nonzero().flatten()
    if keep == "random":
        return torch.cat([unscored, scored])
    ordered = scored[torch.argsort(scores[scored], descending=True, stable=True)]
    hardest, rest = ordered[:offset], ordered[offset:]
    return torch.cat([unscored, rest.flip(0) if keep == "easy" else rest, hardest.flip(0)])


def _bins(scores: Tensor, strata: int) -> Tensor:
    """Return the index of the equal-width bin of each score; infinite scores fall into the first and last bin."""
    finite = scores[scores.isfinite()]
    low, high = (finite.min(), finite.max()) if len(finite) else (scores.new_zeros(()), scores.new_zeros(()))
    width = (high - low) / strata
    if width == 0:
        return torch.where(scores > high, strata - 1, 0)
    return ((scores - low) / width).clamp(0, strata - 1).long()


def _budgets(sizes: Tensor, count: int) -> Tensor:
    budgets = torch.zeros_like(sizes)
    for visited, stratum in enumerate(torch.argsort(sizes, stable=True).tolist()):
        # The unused budget of a small stratum goes to the larger ones after it.
        budgets[stratum] = min(int(sizes[stratum]), count // (len(sizes) - visited))
        count -= int(budgets[stratum])
    return budgets


def _stratified(scores: Tensor, count: int, offset: int, strata: int) -> Tensor:
    """Return ``count`` positions: those without a score, then the first ones of every stratum."""
    ranking = _ranking(scores, "hard", offset)
    missing = int(scores.isnan().sum())
    kept = ranking[: min(missing, count)]
    # Restore the order of the input, which is random.
    pool = ranking[missing : len(ranking) - min(offset, len(ranking) - missing)].sort().values
    bins = _bins(scores[pool], strata)
    budgets = _budgets(torch.bincount(bins, minlength=strata), count - len(kept))
    drawn = [pool[bins == stratum][:budget] for stratum, budget in enumerate(budgets.tolist()) if budget]
    return torch.cat([kept, *drawn])


def _evenly(places: Tensor, count: int, bins: int) -> Tensor:
    """Return ``count`` positions: those without a place, then the first ones of every bin, in proportion to its size."""
    missing = places.isnan()
    kept = missing.nonzero().flatten()[:count]
    pool = (~missing).nonzero().flatten()
    # In a random order of the bins, because the first ones get what cannot be split evenly.
    order = list(dict.fromkeys(bins_of(places[pool], bins).tolist()))
    members = [pool[bins_of(places[pool], bins) == number] for number in order]
    shares = _shares(torch.tensor([len(own) for own in members], dtype=torch.int64), count - len(kept)).tolist()
    return torch.cat([kept, *(own[:share] for own, share in zip(members, shares, strict=True))])


def _shares(sizes: Tensor, count: int) -> Tensor:
    """Split ``count`` over the classes in proportion to their sizes (largest remainder method)."""
    total = int(sizes.sum())
    numerators = sizes * count
    whole = numerators // max(total, 1)
    left = count - int(whole.sum())
    # Ties go to the larger class, then to the first.
    order = sorted(range(len(sizes)), key=lambda c: (-int(numerators[c] % max(total, 1)), -int(sizes[c]), c))
    whole[order[:left]] += 1
    return whole


def _by_class(labels: Tensor) -> list[Tensor]:
    """Return the positions of each class that occurs, in ascending order."""
    sizes = labels.unique(return_counts=True)[1].tolist()  # type: ignore[no-untyped-call]
    return list(torch.argsort(labels, stable=True).split(sizes))  # type: ignore[no-untyped-call]


def _with_floor(ranking: Tensor, labels: Tensor, count: int, class_floor: float) -> Tensor:
    """Return the first ``count`` of a ranking, but keep at least a fraction of each class."""
    reserved = torch.zeros(len(ranking), dtype=torch.bool)
    for places in _by_class(labels[ranking]):
        reserved[places[: len(places) - _whole(1 - class_floor, len(places))]] = True
    needed = int(reserved.sum())
    if needed > count:
        raise ValueError(
            f"class_floor={class_floor} needs {needed} samples, but only {count} are kept. "
            "Lower class_floor, or prune less."
        )
    return torch.cat([ranking[reserved], ranking[~reserved][: count - needed]])


def _check_rule(keep: str, rule: str, balance: str | None, strata: int) -> None:
    check_choice(keep, ("hard", "easy", "random"), "keep")
    check_choice(rule, ("top", "ccs", "dq"), "rule")
    if balance is not None:
        check_choice(balance, ("class",), "balance")
    if rule != "top" and keep != "hard":
        raise ValueError(f"rule={rule!r} draws from all strata of the scores and needs keep='hard'; got keep={keep!r}.")
    if strata < 1:
        raise ValueError(f"strata must be at least 1; got {strata}.")


def _check_count(scores: Tensor, count: int, offset: float) -> None:
    if scores.ndim != 1:
        raise ValueError(f"scores must have one entry for each sample, (n,); got shape {tuple(scores.shape)}.")
    total = len(scores)
    if not 0 <= count <= total:
        raise ValueError(f"count must be between 0 and the number of samples, {total}; got {count}.")
    if not 0.0 <= offset < 1.0:
        raise ValueError(f"offset must be at least 0 and below 1, a fraction of the samples; got {offset}.")
    dropped = _whole(offset, total)
    if count + dropped > total:
        raise ValueError(
            f"offset={offset} drops {dropped} of {total} samples, so {count} cannot be kept. Prune more, or lower "
            "offset."
        )


def _check_classes(scores: Tensor, labels: Tensor | None, balance: str | None, class_floor: float, rule: str) -> None:
    if labels is None and (balance or class_floor):
        what = "balance='class'" if balance else f"class_floor={class_floor}"
        raise ValueError(f"{what} needs the labels of the samples; got none. Pass them as labels=.")
    if labels is not None and labels.shape != scores.shape:
        raise ValueError(f"labels must have one entry for each of the {len(scores)} scores; got {tuple(labels.shape)}.")
    if not 0.0 <= class_floor <= 1.0:
        raise ValueError(f"class_floor must be between 0 and 1, a fraction of each class; got {class_floor}.")
    if class_floor and (balance or rule != "top"):
        raise ValueError("class_floor needs rule='top' and balance=None. Drop class_floor, or use balance='class'.")


def select_samples(
    scores: Tensor,
    count: int,
    keep: str = "hard",
    rule: str = "top",
    offset: float = 0.0,
    labels: Tensor | None = None,
    balance: str | None = None,
    class_floor: float = 0.0,
    strata: int = 50,
    seed: int = 0,
) -> Tensor:
    r"""Select the samples to keep by their scores.

    .. math::
        K = \{i : \operatorname{rank}(s_i) \in (\lfloor o n \rfloor, \lfloor o n \rfloor + k]\}

    for the k hardest samples after an offset o, with rank 1 for the highest score. Ties are ordered by a random
    permutation. A nan score marks a sample that could not be scored; these are kept first. +inf is the hardest score.

    ``rule="ccs"`` (coverage-centric coreset selection) also drops the hardest :math:`\lfloor o n \rfloor` samples. It splits
    the range of the other scores into strata of equal width, divides k evenly between them, and draws at random within
    each. The unused budget of small strata goes to larger ones.

    ``rule="dq"`` (Dataset Quantization) needs the places that :func:`dataset_quantization` returns as scores, and draws
    the same share of every bin at random.

    Args:
        scores: s, (n,): the score of each sample, higher = harder.
        count: k, the number of samples to keep.
        keep: ``"hard"``, ``"easy"`` or ``"random"``; random ignores scores (except nan) and offset.
        rule: ``"top"``; or ``"ccs"`` or ``"dq"`` with ``keep="hard"``.
        offset: o, fraction of n to drop first, the very hardest, which are often mislabeled; not for ``"dq"``.
        labels: (n,) int64: the class of each sample, for ``balance`` and ``class_floor``.
        balance: ``"class"`` keeps the same fraction of each class, and applies offset and rule in each.
        class_floor: Smallest fraction to keep of each class; needs ``rule="top"`` and no ``balance``.
        strata: Number of strata of ``"ccs"`` (50 in the released code), or of bins of ``"dq"`` (10 in the released code).
        seed: Seed of ties and random choices.

    Returns:
        Tensor: (count,) int64, on the CPU: the indices of the samples kept, in ascending order.

    Raises:
        ValueError: If count is outside [0, n], or count and offset together exceed n; if a choice is unknown, labels
            are missing, or arguments cannot be combined.

    Example:
        >>> scores = torch.tensor([0.1, 0.9, 0.5, 0.8, 0.2, 0.3])
        >>> select_samples(scores, 3)
        tensor([1, 2, 3])
        >>> select_samples(scores, 3, offset=0.2)
        tensor([2, 3, 5])
        >>> select_samples(scores, 2, labels=torch.tensor([0, 1, 1, 1, 0, 0]), balance="class")
        tensor([1, 5])

    References:
        Paul et al., "Deep Learning on a Data Diet", 2021, arXiv 2107.07075, sections 3 and 4 (offset); Sorscher et al.,
        2022, arXiv 2206.14486 (easy for scarce data); Zheng et al., "Coverage-centric Coreset Selection for High
        Pruning Rates", 2023, arXiv 2210.15809, algorithm 1; Zhou et al., "Dataset Quantization", 2023, arXiv 2308.10524.
    """
    _check_rule(keep, rule, balance, strata)
    offset = 0.0 if keep == "random" else offset
    if rule == "dq" and (offset or bool(((scores <= 0.0) | (scores >= 1.0)).any())):
        raise ValueError(
            "rule='dq' needs the places that dataset_quantization returns, between 0 and 1, and no offset."
        )
    _check_count(scores, count, offset)
    _check_classes(scores, labels, balance, class_floor, rule)
    scores = scores.detach().to("cpu", torch.float64)
    shuffle = shuffled(len(scores), seed, "selection")

    def choose(among: Tensor, quota: int) -> Tensor:
        """Return ``quota`` of the samples ``among``, which are in shuffled order."""
        dropped = min(_whole(offset, len(among)), len(among) - quota)
        if rule == "dq":
            return among[_evenly(scores[among], quota, strata)]
        if rule == "ccs":
            return among[_stratified(scores[among], quota, dropped, strata)]
        return among[_ranking(scores[among], keep, dropped)[:quota]]

    if labels is not None and class_floor:
        ranking = shuffle[_ranking(scores[shuffle], keep, _whole(offset, len(scores)))]
        kept = _with_floor(ranking, labels.detach().cpu(), count, class_floor)
    elif labels is not None and balance:
        classes = [shuffle[places] for places in _by_class(labels.detach().cpu()[shuffle])]
        quotas = _shares(torch.tensor([len(own) for own in classes], dtype=torch.int64), count).tolist()
        kept = torch.cat([shuffle[:0], *(choose(own, quota) for own, quota in zip(classes, quotas, strict=True))])
    else:
        kept = choose(shuffle, count)
    return kept.sort().values


def round_up_count(count: int, total: int, batch_size: int, ranks: int = 1, drop_last: bool = False) -> int:
    r"""Return the smallest number, at least ``count``, that avoids a last batch of one sample on any rank.

    .. math::
        \min \{m \ge k : \lceil m / R \rceil \bmod B \ne 1\}

    BatchNorm raises an error for a training batch of one sample. The count is not rounded up if B = 1 or if the last
    batch is dropped.

    Args:
        count: k, the number of samples wanted.
        total: Number of samples available; returned if no smaller number is suitable.
        batch_size: B, batch size of one rank.
        ranks: R, the number of processes; each gets :math:`\lceil m / R \rceil` samples, with padding.
        drop_last: Whether the loader drops an incomplete last batch.

    Returns:
        int: m, at least ``ranks``, at most ``total``.

    Example:
        >>> round_up_count(65, 100, batch_size=32), round_up_count(65, 100, batch_size=32, ranks=2)
        (66, 67)
    """
    count = min(max(count, ranks), total)
    if batch_size == 1 or drop_last:
        return count
    while count < total and math.ceil(count / ranks) % batch_size == 1:
        count += 1
    return count


def count_kept(total: int, prune: float, batch_size: int, ranks: int = 1, drop_last: bool = False) -> int:
    r"""Return how many samples to keep when a fraction is pruned.

    .. math::
        n - \lfloor r n \rfloor

    rounded up by :func:`round_up_count`.

    Args:
        total: n, the number of samples.
        prune: r, fraction to prune, at least 0 and below 1.
        batch_size: Batch size of one rank.
        ranks: Number of processes.
        drop_last: Whether the loader drops an incomplete last batch.

    Returns:
        int: The number to keep, at least ``ranks`` and at most n.

    Example:
        >>> count_kept(1000, 0.5, batch_size=64), count_kept(130, 0.5, batch_size=64)
        (500, 66)
    """
    return round_up_count(total - _whole(prune, total), total, batch_size, ranks, drop_last)
