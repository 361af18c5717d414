"""Which samples to keep, given a score for each: the hardest, the easiest, random ones, or some of every stratum.

Scores are such that higher is harder. Everything here is computed on the CPU from seeded generators, so that every rank
selects the same samples.
"""

import math

import torch
from torch import Tensor

from lightning_grad.functional.choices import check_choice
from lightning_grad.functional.shuffling import shuffled


def _whole(share: float, total: int) -> int:
    # 0.29 * 100 is 28.999999999999996, and should count as 29.
    return math.floor(share * total * (1 + 1e-12))


def _ranking(scores: Tensor, keep: str, left_out: int) -> Tensor:
    """Return all positions, those to be kept first and the hardest ``left_out`` last; equal scores stay in their order."""
    missing = scores.isnan()
    unscored, scored = missing.nonzero().flatten(), (~missing).nonzero().flatten()
    if keep == "random":
        return torch.cat([unscored, scored])
    ordered = scored[torch.argsort(scores[scored], descending=True, stable=True)]
    hardest, rest = ordered[:left_out], ordered[left_out:]
    return torch.cat([unscored, rest.flip(0) if keep == "easy" else rest, hardest.flip(0)])


def _bins(scores: Tensor, strata: int) -> Tensor:
    """Return the number of the equal-width bin of each score; infinite ones are in the bins at the ends."""
    finite = scores[scores.isfinite()]
    low, high = (finite.min(), finite.max()) if len(finite) else (scores.new_zeros(()), scores.new_zeros(()))
    width = (high - low) / strata
    if width == 0:
        return torch.where(scores > high, strata - 1, 0)
    return ((scores - low) / width).clamp(0, strata - 1).long()


def _budgets(sizes: Tensor, count: int) -> Tensor:
    budgets = torch.zeros_like(sizes)
    for visited, stratum in enumerate(torch.argsort(sizes, stable=True).tolist()):
        # What a small stratum cannot use goes to the larger ones after it.
        budgets[stratum] = min(int(sizes[stratum]), count // (len(sizes) - visited))
        count -= int(budgets[stratum])
    return budgets


def _stratified(scores: Tensor, count: int, left_out: int, strata: int) -> Tensor:
    """Return ``count`` positions: those without a score, then the first ones of every stratum."""
    ranking = _ranking(scores, "hard", left_out)
    missing = int(scores.isnan().sum())
    kept = ranking[: min(missing, count)]
    # In the order of the scores again, which is the random one.
    pool = ranking[missing : len(ranking) - min(left_out, len(ranking) - missing)].sort().values
    bins = _bins(scores[pool], strata)
    budgets = _budgets(torch.bincount(bins, minlength=strata), count - len(kept))
    drawn = [pool[bins == stratum][:budget] for stratum, budget in enumerate(budgets.tolist()) if budget]
    return torch.cat([kept, *drawn])


def _shares(sizes: Tensor, count: int) -> Tensor:
    """Return how many of each class make up ``count`` in proportion to its size, by the largest remainder."""
    total = int(sizes.sum())
    numerators = sizes * count
    whole = numerators // max(total, 1)
    left = count - int(whole.sum())
    # Of equal remainders the larger class goes first, then the first class.
    order = sorted(range(len(sizes)), key=lambda c: (-int(numerators[c] % max(total, 1)), -int(sizes[c]), c))
    whole[order[:left]] += 1
    return whole


def _by_class(labels: Tensor) -> list[Tensor]:
    """Return the positions of each class that occurs, in their order."""
    sizes = labels.unique(return_counts=True)[1].tolist()  # type: ignore[no-untyped-call]
    return list(torch.argsort(labels, stable=True).split(sizes))  # type: ignore[no-untyped-call]


def _with_floor(ranking: Tensor, labels: Tensor, count: int, class_floor: float) -> Tensor:
    """Return the first ``count`` of a ranking, but of each class at least a share."""
    reserved = torch.zeros(len(ranking), dtype=torch.bool)
    for places in _by_class(labels[ranking]):
        reserved[places[: len(places) - _whole(1 - class_floor, len(places))]] = True
    needed = int(reserved.sum())
    if needed > count:
        raise ValueError(
            f"class_floor={class_floor} keeps {needed} samples, but only {count} are to be kept. "
            "Lower class_floor, or prune less."
        )
    return torch.cat([ranking[reserved], ranking[~reserved][: count - needed]])


def _check_rule(keep: str, rule: str, balance: str | None, strata: int) -> None:
    check_choice(keep, ("hard", "easy", "random"), "keep")
    check_choice(rule, ("top", "ccs"), "rule")
    if balance is not None:
        check_choice(balance, ("class",), "balance")
    if rule == "ccs" and keep != "hard":
        raise ValueError(
            f"rule='ccs' draws from every stratum of the scores, and goes with keep='hard'; got keep={keep!r}."
        )
    if strata < 1:
        raise ValueError(f"strata must be at least 1; got {strata}.")


def _check_count(scores: Tensor, count: int, offset: float) -> None:
    if scores.ndim != 1:
        raise ValueError(f"scores must have one entry for each sample, (n,); got the shape {tuple(scores.shape)}.")
    total = len(scores)
    if not 0 <= count <= total:
        raise ValueError(f"count must be between 0 and the number of samples, {total}; got {count}.")
    if not 0.0 <= offset < 1.0:
        raise ValueError(f"offset must be at least 0 and below 1, a share of the samples; got {offset}.")
    left_out = _whole(offset, total)
    if count + left_out > total:
        raise ValueError(
            f"offset={offset} leaves out {left_out} of {total} samples, so that {count} cannot be kept. "
            "Prune more, or lower offset."
        )


def _check_classes(scores: Tensor, labels: Tensor | None, balance: str | None, class_floor: float, rule: str) -> None:
    if labels is None and (balance or class_floor):
        what = "balance='class'" if balance else f"class_floor={class_floor}"
        raise ValueError(f"{what} needs the labels of the samples; got none. Pass them as labels=.")
    if labels is not None and labels.shape != scores.shape:
        raise ValueError(f"labels must have one entry for each of the {len(scores)} scores; got {tuple(labels.shape)}.")
    if not 0.0 <= class_floor <= 1.0:
        raise ValueError(f"class_floor must be between 0 and 1, a share of each class; got {class_floor}.")
    if class_floor and (balance or rule == "ccs"):
        raise ValueError(
            "class_floor goes with rule='top' and without balance. Drop class_floor, or use balance='class'."
        )


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
    r"""Choose which samples to keep by their scores.

    .. math::
        K = \{i : \operatorname{rank}(s_i) \in (\lfloor o n \rfloor, \lfloor o n \rfloor + k]\}

    for the k hardest after an offset o, with rank 1 for the highest score. Equal scores are ordered by a permutation that
    the seed gives. A sample whose score is nan could not be scored, and is kept before all others; +inf is the hardest.

    ``rule="ccs"`` (coverage-centric coreset selection) also leaves out the hardest :math:`\lfloor o n \rfloor`, splits the
    range of the other scores into strata of equal width, shares k out over them evenly, and draws at random within each.
    What a stratum is too small for goes to the larger ones.

    Args:
        scores: s, (n,): the score of each sample, higher = harder.
        count: k, how many are kept.
        keep: ``"hard"``, ``"easy"``, or ``"random"``, which looks at no score but for nan, and takes no offset.
        rule: ``"top"``, or ``"ccs"`` with ``keep="hard"``.
        offset: o, share of n that is left out first, the very hardest: they are often mislabelled.
        labels: (n,) int64: the class of each sample, for ``balance`` and ``class_floor``.
        balance: ``"class"`` keeps the same share of each class (and takes offset and rule within each).
        class_floor: Least share of each class that is kept, without ``balance`` and with ``rule="top"``.
        strata: Number of strata of ``"ccs"``; 50 in the released code.
        seed: Seed of ties and random choices.

    Returns:
        Tensor: (count,) int64, on the CPU: the indices of the samples kept, in rising order.

    Raises:
        ValueError: If count lies outside [0, n], or with the offset needs more than n; if a choice is unknown, labels are
            missing, or what is asked for cannot be combined.

    Example:
        >>> scores = torch.tensor([0.1, 0.9, 0.5, 0.8, 0.2, 0.3])
        >>> select_samples(scores, 3)
        tensor([1, 2, 3])
        >>> select_samples(scores, 3, offset=0.2)
        tensor([2, 3, 5])
        >>> select_samples(scores, 2, labels=torch.tensor([0, 1, 1, 1, 0, 0]), balance="class")
        tensor([1, 5])

    References:
        Paul et al., "Deep Learning on a Data Diet", 2021, arXiv 2107.07075, sections 3 and 4 (offset); Sorscher et al., 2022,
        arXiv 2206.14486 (easy for scarce data); Zheng et al., "Coverage-centric Coreset Selection for High Pruning
        Rates", 2023, arXiv 2210.15809, algorithm 1.
    """
    _check_rule(keep, rule, balance, strata)
    # A random choice takes no offset.
    offset = 0.0 if keep == "random" else offset
    _check_count(scores, count, offset)
    _check_classes(scores, labels, balance, class_floor, rule)
    scores = scores.detach().to("cpu", torch.float64)
    shuffle = shuffled(len(scores), seed, "selection")

    def choose(among: Tensor, quota: int) -> Tensor:
        """Return ``quota`` of the samples ``among``, which come in shuffled order."""
        left_out = min(_whole(offset, len(among)), len(among) - quota)
        if rule == "ccs":
            return among[_stratified(scores[among], quota, left_out, strata)]
        return among[_ranking(scores[among], keep, left_out)[:quota]]

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
    r"""Return the least number from ``count`` on that leaves no rank with a last batch of one sample.

    .. math::
        \min \{m \ge k : \lceil m / R \rceil \bmod B \ne 1\}

    BatchNorm raises on a batch of one in training. Nothing is rounded up for B = 1, nor where the last batch is dropped.

    Args:
        count: k, the number of samples wanted.
        total: The number there is; returned if no number up to it will do.
        batch_size: B, samples in a batch of one rank.
        ranks: R, the number of processes; each gets :math:`\lceil m / R \rceil` samples, the last ones by padding.
        drop_last: Whether the loader drops a last batch that is not full.

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
    r"""Return how many samples are kept when a share is pruned.

    .. math::
        n - \lfloor r n \rfloor

    rounded up by :func:`round_up_count`.

    Args:
        total: n, the number of samples.
        prune: r, share to be pruned, at least 0 and below 1.
        batch_size: Samples in a batch of one rank.
        ranks: Number of processes.
        drop_last: Whether the loader drops a last batch that is not full.

    Returns:
        int: The number to keep, at least ``ranks`` and at most n.

    Example:
        >>> count_kept(1000, 0.5, batch_size=64), count_kept(130, 0.5, batch_size=64)
        (500, 66)
    """
    return round_up_count(total - _whole(prune, total), total, batch_size, ranks, drop_last)
