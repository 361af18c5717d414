"""Selection against sorting by hand, a transcription of the released CCS code, and what it promises of counts and classes."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from lightning_grad.functional.data_pruning.selection import count_kept, round_up_count, select_samples
from tests.cases import cases

NAN, INF = float("nan"), float("inf")


def draw(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw_labels(n: int, classes: int, seed: int = 0) -> Tensor:
    """Return labels of classes of quite different sizes."""
    weights = 2.0 ** torch.arange(classes)
    return torch.multinomial(weights, n, replacement=True, generator=torch.Generator().manual_seed(seed))


# The top of a ranking.


@pytest.mark.parametrize("count", [0, 1, 7, 49, 50])
@pytest.mark.parametrize("keep", ["hard", "easy"])
def test_the_top_is_that_of_a_sort(keep: str, count: int) -> None:
    scores = draw(50)
    by_hardness = sorted(range(50), key=lambda i: scores[i].item(), reverse=keep == "hard")
    assert select_samples(scores, count, keep).tolist() == sorted(by_hardness[:count])


@pytest.mark.parametrize(
    ("keep", "offset", "expected"),
    [
        ("hard", 0.0, [6, 7, 8, 9]),
        ("hard", 0.1, [5, 6, 7, 8]),
        ("hard", 0.3, [3, 4, 5, 6]),
        ("hard", 0.29, [4, 5, 6, 7]),  # 2.9 of 10 samples: two
        ("easy", 0.0, [0, 1, 2, 3]),
        ("easy", 0.6, [0, 1, 2, 3]),
    ],
)
def test_offset_leaves_out_the_very_hardest(keep: str, offset: float, expected: list[int]) -> None:
    assert select_samples(torch.arange(10.0), 4, keep, offset=offset).tolist() == expected


def test_a_share_that_floating_point_misses_counts_whole() -> None:
    assert 0.29 * 100 < 29
    assert select_samples(torch.arange(100.0), 1, offset=0.29).tolist() == [70]
    assert count_kept(100, 0.29, batch_size=64) == 71
    assert count_kept(10**9, 0.29, batch_size=64) == 71 * 10**7


def test_infinite_scores_are_the_extremes() -> None:
    scores = torch.tensor([0.0, INF, -INF, 1.0, -1.0])
    order = [2, 4, 0, 3, 1]
    for count in range(6):
        assert select_samples(scores, count).tolist() == sorted(order[5 - count :])
        assert select_samples(scores, count, "easy").tolist() == sorted(order[:count])


@pytest.mark.parametrize(("keep", "rule"), [("hard", "top"), ("easy", "top"), ("random", "top"), ("hard", "ccs")])
def test_samples_without_a_score_are_kept_first(keep: str, rule: str) -> None:
    scores = draw(30)
    scores[[3, 11, 29]] = NAN
    offset = 0.1 if keep == "hard" else 0.0
    for count in range(28):
        kept = set(select_samples(scores, count, keep, rule, offset).tolist())
        assert len(kept) == count
        assert len(kept & {3, 11, 29}) == min(count, 3)
    assert set(select_samples(scores, 4).tolist()) - {3, 11, 29} == {int(scores.nan_to_num(0.0).argmax())}


def test_all_scores_nan_is_a_random_choice() -> None:
    first, second = (select_samples(torch.full((50,), NAN), 20, seed=seed).tolist() for seed in (0, 1))
    assert first != second
    assert len(set(first)) == 20


def test_random_looks_at_no_score() -> None:
    first = select_samples(draw(100), 40, "random", seed=3)
    assert torch.equal(first, select_samples(-draw(100, 5), 40, "random", offset=0.5, seed=3))
    assert not torch.equal(first, select_samples(draw(100), 40, "random", seed=4))
    hits = torch.zeros(10)
    for seed in range(500):
        hits[select_samples(torch.arange(10.0), 5, "random", seed=seed)] += 1
    assert (hits / 500 - 0.5).abs().max() < 0.08  # 3.5 standard deviations


def test_ties_are_ordered_by_the_seed_alone() -> None:
    scores = torch.tensor([1.0] * 10 + [0.0] * 10)
    kept = [select_samples(scores, 5, seed=seed).tolist() for seed in range(200)]
    assert all(max(k) < 10 for k in kept), "ties are broken among the hardest only"
    counts = torch.bincount(torch.tensor(kept).flatten(), minlength=10)
    assert counts.min() > 60, "no position is preferred"
    assert select_samples(scores, 5, seed=7).tolist() == kept[7]
    assert select_samples(scores, 15, seed=7).tolist()[:10] == list(range(10))


def test_global_random_state_is_neither_read_nor_changed() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = select_samples(draw(50), 20, rule="ccs")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(select_samples(draw(50), 20, rule="ccs"), first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64])
def test_any_dtype_and_a_graph_are_fine(dtype: torch.dtype) -> None:
    scores = torch.arange(8).to(dtype).requires_grad_(dtype.is_floating_point)
    kept = select_samples(scores, 3)
    assert kept.tolist() == [5, 6, 7]
    assert kept.dtype == torch.int64


# Classes.


@cases("seed", range(20))
@cases(("keep", "rule"), [("hard", "top"), ("easy", "top"), ("random", "top"), ("hard", "ccs")])
def test_balance_keeps_the_same_share_of_each_class(keep: str, rule: str, seed: int) -> None:
    n = 60 + seed
    scores, labels = draw(n, seed), draw_labels(n, 4, seed)
    scores[seed] = NAN
    offset = 0.1 if keep == "hard" else 0.0
    for count in range(0, int(0.9 * n), 7):
        kept = select_samples(scores, count, keep, rule, offset, labels, balance="class")
        assert len(kept) == count
        assert len(kept.unique()) == count
        sizes = torch.bincount(labels, minlength=4).double()
        quotas = torch.bincount(labels[kept], minlength=4).double()
        assert ((quotas - sizes * count / n).abs() < 1).all(), "no class is off by a whole sample"


def test_balance_takes_the_hardest_of_each_class() -> None:
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.1, 0.2])
    labels = torch.tensor([0, 0, 0, 0, 5, 5])
    assert select_samples(scores, 3, labels=labels, balance="class").tolist() == [0, 1, 5]
    assert select_samples(scores, 3, labels=labels, balance="class", offset=0.25).tolist() == [1, 2, 5]
    assert select_samples(scores, 3, "easy", labels=labels, balance="class").tolist() == [2, 3, 4]


def test_balance_with_an_offset_that_rounds_keeps_the_exact_count() -> None:
    for sizes in itertools.product([1, 2, 3], repeat=3):
        labels = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))
        n = len(labels)
        for count, offset in itertools.product(range(n + 1), (0.0, 0.34, 0.5)):
            if count + math.floor(offset * n) <= n:
                for rule in ("top", "ccs"):
                    kept = select_samples(draw(n), count, "hard", rule, offset, labels, "class")
                    assert len(kept) == count


def test_balance_takes_from_the_offset_where_quotas_round_up() -> None:
    """The class of four keeps two, so that only two of its three hardest can be left out."""
    labels = torch.tensor([0, 1, 2, 2, 2, 2])
    for rule in ("top", "ccs"):
        assert select_samples(torch.arange(6.0), 2, "hard", rule, 0.8, labels, "class").tolist() == [2, 3]


def test_floor_keeps_a_share_of_each_class_and_else_the_hardest() -> None:
    labels = torch.tensor([0] * 10 + [1] * 10)
    scores = torch.arange(20.0)  # class 1 is harder throughout
    assert select_samples(scores, 10).tolist() == [*range(10, 20)]
    kept = select_samples(scores, 10, labels=labels, class_floor=0.25)
    assert kept.tolist() == [7, 8, 9, *range(13, 20)], "a quarter of ten is three, rounded up"
    assert select_samples(scores, 10, labels=labels, class_floor=0.5).tolist() == [*range(5, 10), *range(15, 20)]


@pytest.mark.parametrize("seed", range(20))
def test_floor_holds_and_changes_no_more_than_it_must(seed: int) -> None:
    scores, labels = draw(100, seed), draw_labels(100, 5, seed)
    count, floor = 40, 0.3
    kept = select_samples(scores, count, labels=labels, class_floor=floor)
    plain = select_samples(scores, count)
    sizes = torch.bincount(labels)
    assert len(kept) == count
    assert (torch.bincount(labels[kept], minlength=5) >= (floor * sizes).ceil()).all()
    missing = ((floor * sizes).ceil() - torch.bincount(labels[plain], minlength=5)).clamp(min=0).sum()
    assert len(set(plain.tolist()) - set(kept.tolist())) == missing


def test_floor_takes_from_the_offset_only_what_it_must() -> None:
    labels = torch.tensor([0] * 8 + [1] * 2)
    scores = torch.arange(10.0)  # the whole class 1 is in the hardest fifth
    kept = select_samples(scores, 6, offset=0.2, labels=labels, class_floor=0.5)
    assert kept.tolist() == [3, 4, 5, 6, 7, 8], "one of class 1, and the easier one"


# Strata: the released code.


def released_budgets(total: int, bins: Tensor) -> Tensor:
    """How github.com/haizhongzheng/Coverage-centric-coreset-selection shares out a budget, smallest bin first."""
    order, budgets = torch.argsort(bins), torch.zeros_like(bins)
    for visited, i in enumerate(order):
        budgets[i] = min(int(bins[i]), total // (len(bins) - visited))
        total -= int(budgets[i])
    return budgets


def released_bins(score: Tensor, strata: int) -> Tensor:
    low, high = score.min(), score.max() * 1.0001
    step = (high - low) / strata
    edges = [low + k * step for k in range(strata + 1)]
    return torch.tensor([int(((score >= a) & (score < b)).sum()) for a, b in itertools.pairwise(edges)])


@pytest.mark.parametrize("strata", [1, 5, 50])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.3])
def test_strata_get_the_budgets_of_the_released_code(beta: float, strata: int) -> None:
    n, count = 500, 60
    scores = draw(n) ** 3 + 0.5
    left = scores.sort(descending=True).values[math.floor(beta * n) :]
    kept = scores[select_samples(scores, count, rule="ccs", offset=beta, strata=strata)]
    assert len(kept) == count
    assert kept.max() <= left.max(), "the hardest are left out"
    # The released code stretches the range by 1e-4 to close the last bin, so sizes are taken with exact edges here.
    bins = ((left - left.min()) / (left.max() - left.min()) * strata).clamp(max=strata - 1).long()
    sizes = torch.bincount(bins, minlength=strata)
    assert (sizes - released_bins(left, strata)).abs().sum() <= 4
    kept_bins = ((kept - left.min()) / (left.max() - left.min()) * strata).clamp(max=strata - 1).long()
    taken = torch.bincount(kept_bins, minlength=strata)
    assert taken.sort().values.tolist() == released_budgets(count, sizes).sort().values.tolist()
    assert (taken <= sizes).all()
    small = sizes <= count // strata
    assert torch.equal(taken[small], sizes[small]), "small strata are kept whole"


def test_strata_are_drawn_at_random() -> None:
    scores = torch.cat([torch.linspace(0.0, 0.1, 100), torch.linspace(0.9, 1.0, 100)])
    kept = [select_samples(scores, 20, rule="ccs", strata=2, seed=seed) for seed in range(200)]
    assert all(int((k < 100).sum()) == 10 for k in kept)
    hits = torch.bincount(torch.cat(kept), minlength=200)
    assert hits.min() > 5
    assert hits.max() < 45  # 20 expected, 5.6 standard deviations


@pytest.mark.parametrize(
    "scores",
    [torch.ones(20), torch.full((20,), INF), torch.tensor([INF, -INF] * 10), torch.tensor([0.0, 1.0, INF, NAN] * 5)],
)
def test_strata_of_degenerate_scores_keep_the_exact_count(scores: Tensor) -> None:
    for count in range(19):
        assert len(select_samples(scores, count, rule="ccs", offset=0.1).unique()) == count


# Errors.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 11}, "between 0 and the number of samples, 10; got 11"),
        ({"count": -1}, "between 0"),
        ({"count": 8, "offset": 0.3}, "drops 3 of 10 samples, so 8"),
        ({"offset": 1.0}, "offset must be at least 0 and below 1"),
        ({"offset": -0.1}, "offset must be"),
        ({"keep": "hrad"}, "Did you mean 'hard'"),
        ({"rule": "bottom"}, "rule must be 'top', 'ccs' or 'dq'; got 'bottom'"),
        ({"balance": "classes"}, "Did you mean 'class'"),
        ({"balance": "class"}, "needs the labels"),
        ({"class_floor": 0.1}, "needs the labels"),
        ({"class_floor": 0.1, "balance": "class", "labels": torch.zeros(10, dtype=torch.int64)}, "balance=None"),
        ({"class_floor": 0.1, "rule": "ccs", "labels": torch.zeros(10, dtype=torch.int64)}, "rule='top'"),
        ({"class_floor": 1.5, "labels": torch.zeros(10, dtype=torch.int64)}, "between 0 and 1"),
        ({"class_floor": 0.9, "labels": torch.zeros(10, dtype=torch.int64)}, "needs 9 samples, but only 5"),
        ({"labels": torch.zeros(9, dtype=torch.int64)}, "labels must have one entry"),
        ({"rule": "ccs", "keep": "easy"}, "keep='hard'"),
        ({"strata": 0}, "strata must be at least 1"),
        ({"scores": torch.zeros(2, 5)}, "one entry for each sample"),
    ],
)
def test_what_cannot_be_selected_raises(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_samples(**{"scores": torch.arange(10.0), "count": 5, **arguments})  # type: ignore[arg-type]


# How many.


def batches_of_each_rank(count: int, batch_size: int, ranks: int) -> list[int]:
    """Return the sizes of the batches of a rank, as DistributedSampler pads and DataLoader cuts."""
    own = math.ceil(count / ranks)
    return [min(batch_size, own - start) for start in range(0, own, batch_size)]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_no_rank_is_left_with_a_batch_of_one(batch_size: int, ranks: int) -> None:
    raised = 0
    for total in range(ranks, 60):
        for prune in (0.0, 0.25, 0.5, 0.9):
            least = max(total - math.floor(prune * total + 1e-9), min(ranks, total))
            count = count_kept(total, prune, batch_size, ranks)
            assert least <= count <= total
            assert 1 not in batches_of_each_rank(count, batch_size, ranks) or count == total
            # And no smaller number would do.
            assert all(1 in batches_of_each_rank(m, batch_size, ranks) for m in range(least, count))
            raised += count > least
    assert raised


def test_nothing_is_rounded_up_where_a_batch_of_one_cannot_be() -> None:
    assert count_kept(130, 0.5, batch_size=64) == 66
    assert count_kept(130, 0.5, batch_size=64, drop_last=True) == 65
    assert count_kept(130, 0.5, batch_size=1) == 65
    assert count_kept(65, 0.0, batch_size=64) == 65
    assert count_kept(10, 0.99, batch_size=1, ranks=4) == 4
    assert count_kept(3, 0.5, batch_size=1, ranks=4) == 3
    assert round_up_count(1, 1, batch_size=8) == 1


def test_a_random_choice_is_not_what_others_draw_from_the_same_seed() -> None:
    others = torch.randperm(1400, generator=torch.Generator().manual_seed(0))[:140]
    kept = select_samples(torch.zeros(1400), 140, keep="random", seed=0)
    assert torch.isin(kept, others).sum() < 30  # 14 by chance; all of them, if both were the same permutation
