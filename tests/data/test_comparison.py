"""Rank correlation against scipy, and overlap against sets."""

import pytest
import torch
from torch import Tensor

from lightning_grad.data import SampleScores, compare_scores

NAN, INF = float("nan"), float("inf")


def pair(n: int, seed: int, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(n, generator=generator, dtype=torch.float64)
    return first, first + noise * torch.randn(n, generator=generator, dtype=torch.float64)


# Rank correlation.


@pytest.mark.parametrize("levels", [None, 2, 5, 30])
@pytest.mark.parametrize("n", [3, 10, 500])
def test_spearman_is_that_of_scipy(n: int, levels: int | None) -> None:
    stats = pytest.importorskip("scipy.stats")
    for seed in range(10):
        first, second = pair(n, seed)
        if levels:  # scores with ties
            first, second = (first * levels / 4).round(), (second * levels / 4).round()
        if first.unique().numel() == 1 or second.unique().numel() == 1:
            continue  # scipy warns; that case is below
        expected = stats.spearmanr(first.numpy(), second.numpy()).statistic
        assert compare_scores(first, second).spearman == pytest.approx(expected, abs=1e-11)


def test_spearman_by_hand() -> None:
    assert compare_scores(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 20.0, 1e9])).spearman == 1.0
    assert compare_scores(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 2.0, -INF])).spearman == -1.0
    # Ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: covariance 4.5, variances 4.5 and 5.
    assert compare_scores(torch.tensor([0.0, 1.0, 1.0, 2.0]), torch.arange(4.0)).spearman == pytest.approx(
        4.5 / (4.5 * 5) ** 0.5
    )


def test_a_score_that_is_the_same_for_all_has_no_correlation() -> None:
    found = compare_scores(torch.ones(1000), torch.ones(1000), shares=(0.3,))
    assert found.spearman != found.spearman  # nan
    assert found.overlap[0.3] == pytest.approx(0.3, abs=0.1), "ties are no agreement"


# Overlap.


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 1.0])
def test_overlap_is_that_of_sets(share: float) -> None:
    for seed in range(5):
        first, second = pair(200, seed)
        count = round(share * 200)
        sets = [set(sorted(range(200), key=lambda i, s=s: -s[i].item())[:count]) for s in (first, second)]
        assert compare_scores(first, second, (share,)).overlap == {share: len(sets[0] & sets[1]) / count}


def test_scores_that_have_nothing_in_common_come_to_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    found = compare_scores(torch.rand(5000, generator=generator), torch.rand(5000, generator=generator))
    assert found.spearman == pytest.approx(0.0, abs=0.05)
    assert list(found.overlap.values()) == pytest.approx([0.1, 0.2, 0.5], abs=0.04)


# Which samples are compared.


def test_samples_that_either_could_not_score_are_left_out() -> None:
    first = torch.tensor([1.0, 2.0, NAN, 4.0, 5.0])
    second = torch.tensor([2.0, 1.0, 9.0, NAN, 3.0])
    found = compare_scores(first, second, (0.5,))
    assert found == compare_scores(torch.tensor([1.0, 2.0, 5.0]), torch.tensor([2.0, 1.0, 3.0]), (0.5,))
    assert found.n == 3


def test_scores_with_indices_are_compared_item_by_item() -> None:
    first = SampleScores(torch.tensor([1.0, 2.0, 3.0, 4.0]), "a", index=torch.tensor([7, 5, 3, 1]))
    second = SampleScores(torch.arange(8.0), "b")
    found = compare_scores(first, second, (0.25,))
    assert (found.n, found.spearman, found.overlap) == (4, -1.0, {0.25: 0.0})


@pytest.mark.parametrize(
    ("a", "b", "shares", "message"),
    [
        (torch.zeros(3), torch.zeros(4), (0.5,), "got 3 and 4"),
        (torch.zeros(3), torch.full((3,), NAN), (0.5,), "at least two samples with both scores; got 0"),
        (torch.zeros(3), torch.zeros(3), (0.0,), "above 0 and at most 1; got 0.0"),
        (torch.zeros(3), torch.zeros(3), (1.5,), "got 1.5"),
    ],
)
def test_what_cannot_be_compared_raises(a: Tensor, b: Tensor, shares: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare_scores(a, b, shares)


def test_scores_of_far_indices_are_compared_without_a_table_of_them_all() -> None:
    far = torch.tensor([5, 2**60, 3, 7])
    a = SampleScores(torch.tensor([1.0, 2.0, 3.0, 4.0]), "el2n", index=far)
    b = SampleScores(torch.tensor([9.0, 1.0, 2.0, NAN, 3.0]), "el2n", index=torch.tensor([8, 3, 5, 7, 2**60]))
    assert compare_scores(a, b, (0.5,)).n == 3
    assert compare_scores(a, b, (0.5,)).spearman == -0.5
