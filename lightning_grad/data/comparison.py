"""Agreement of two scores: rank correlation, and overlap of the hardest samples."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_grad.data.score_files import SampleScores
from lightning_grad.functional.data_pruning.selection import select_samples

Scores = SampleScores | Tensor


@dataclass(frozen=True)
class Comparison:
    """The agreement of two scores.

    Attributes:
        n: Number of samples that have both scores.
        spearman: Rank correlation, -1 to 1; nan if a score is constant.
        overlap: For each share k, the fraction of the k hardest samples by one score that are also among the k hardest
            by the other. Unrelated scores have an overlap of about k.
    """

    n: int
    spearman: float
    overlap: dict[float, float]


def _average_ranks(values: Tensor) -> Tensor:
    _, places, counts = values.unique(return_inverse=True, return_counts=True)  # type: ignore[no-untyped-call]
    ranks: Tensor = counts.cumsum(0).double() - (counts - 1) / 2
    return ranks[places]


def _spearman(a: Tensor, b: Tensor) -> float:
    centered = [ranks - ranks.mean() for ranks in (_average_ranks(a), _average_ranks(b))]
    return float(torch.dot(*centered) / (centered[0].norm() * centered[1].norm()))


def _aligned(a: Scores, b: Scores) -> tuple[Tensor, Tensor]:
    """Return the values of both scores for the samples that have both."""
    scores = [item if isinstance(item, SampleScores) else SampleScores(item, "scores") for item in (a, b)]
    if all(item.index is None for item in scores) and len(scores[0].values) != len(scores[1].values):
        raise ValueError(
            f"Scores must have equal lengths to be compared; got {len(scores[0].values)} and "
            f"{len(scores[1].values)}. Compare scores of one data set."
        )
    # Sort, because a lookup table over all indices would become huge with a single large index.
    (index, first), (other, second) = (_sorted(item) for item in scores)
    first, second = first[torch.isin(index, other)], second[torch.isin(other, index)]
    both = ~(first.isnan() | second.isnan())
    return first[both], second[both]


def _sorted(scores: SampleScores) -> tuple[Tensor, Tensor]:
    index, order = scores.items.sort()
    return index, scores.values[order]


def compare_scores(a: Scores, b: Scores, shares: Sequence[float] = (0.1, 0.2, 0.5)) -> Comparison:
    r"""Compare two scores of the same samples.

    .. math::
        \rho = \operatorname{corr}(R(a), R(b)), \qquad o_k = \frac{|H_k(a) \cap H_k(b)|}{kn}

    R are ranks, with the mean rank for ties, and :math:`H_k` the kn hardest samples. Samples without both scores are
    excluded. Ties at the border of :math:`H_k` are broken at random, independently for a and b.

    Args:
        a: Scores, (n,), or a result of :func:`~lightning_grad.data.load_scores`.
        b: Scores of the same samples; if they have indices, only common ones are compared.
        shares: k, each above 0 and at most 1.

    Returns:
        Comparison: Number of samples, rank correlation and overlaps.

    Raises:
        ValueError: If the lengths differ, fewer than two samples have both scores, or a share is outside (0, 1].

    Example:
        >>> compare_scores(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 2.0, 4.0, 3.0]), shares=(0.5,))
        Comparison(n=4, spearman=0.8, overlap={0.5: 1.0})
    """
    first, second = _aligned(a, b)
    n = len(first)
    if n < 2:
        raise ValueError(
            f"A comparison needs at least two samples with both scores; got {n}. Compare scores of the same samples."
        )
    overlap = {}
    for share in shares:
        if not 0.0 < share <= 1.0:
            raise ValueError(f"shares must be above 0 and at most 1; got {share}.")
        count = max(1, round(share * n))
        # With one seed for both, two constant scores would agree perfectly.
        sets = [set(select_samples(s, count, seed=seed).tolist()) for seed, s in enumerate((first, second))]
        overlap[share] = len(sets[0] & sets[1]) / count
    return Comparison(n, round(_spearman(first, second), 12), overlap)
