"""Repeated random subsets by counting which sample was seen when."""

import itertools

import pytest
import torch

from lightning_grad.functional import repeated_random_subset


@pytest.mark.parametrize("total", [1, 2, 5, 12, 30])
@pytest.mark.parametrize("seed", [0, 1])
def test_each_sample_is_seen_once_before_any_is_seen_twice(total: int, seed: int) -> None:
    for count in range(1, total + 1):
        seen = torch.zeros(total, dtype=torch.int64)
        for epoch in range(3 * total):
            subset = repeated_random_subset(total, count, epoch, seed)
            assert len(subset) == count
            assert len(subset.unique()) == count, "an epoch has no sample twice"
            assert torch.equal(subset, subset.sort().values)
            seen[subset] += 1
            assert seen.max() - seen.min() <= 1


def test_the_epochs_of_a_cycle_are_random_and_differ() -> None:
    first = [repeated_random_subset(100, 25, epoch, 0).tolist() for epoch in range(8)]
    assert sorted(itertools.chain(*first[:4])) == list(range(100))
    assert sorted(itertools.chain(*first[4:])) == list(range(100))
    assert len({tuple(subset) for subset in first}) == 8, "the second cycle has an order of its own"
    assert first[0] != repeated_random_subset(100, 25, 0, 1).tolist()


def test_every_sample_is_as_likely_as_the_other_in_every_epoch() -> None:
    for epoch in (0, 1, 2, 5):
        hits = torch.zeros(5)
        for seed in range(600):
            hits[repeated_random_subset(5, 3, epoch, seed)] += 1
        assert (hits / 600 - 0.6).abs().max() < 0.08  # four standard deviations


def test_a_subset_depends_on_its_arguments_only() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    late = repeated_random_subset(50, 35, 19, 4)
    assert torch.equal(torch.get_rng_state(), state)
    for epoch in range(19):
        repeated_random_subset(50, 35, epoch, 4)
    assert torch.equal(repeated_random_subset(50, 35, 19, 4), late)


def test_late_epochs_of_large_sets_cost_a_few_permutations(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    randperm = torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *args, **kwargs: made.append(1) or randperm(*args, **kwargs))
    for count in (1, 300, 500, 700, 900):
        for epoch in (0, 10_000, 10_001, 10_007):
            made.clear()
            repeated_random_subset(1009, count, epoch, 0)  # a prime: no epoch but the first starts with a permutation
            assert len(made) <= 2 * 1009 // (1009 - count) + 4


def test_with_replacement_epochs_are_independent() -> None:
    subsets = [repeated_random_subset(20, 10, epoch, 0, replacement=True) for epoch in range(400)]
    assert all(len(subset.unique()) == 10 for subset in subsets)
    overlaps = [len(set(a.tolist()) & set(b.tolist())) for a, b in itertools.pairwise(subsets)]
    assert sum(overlaps) / len(overlaps) == pytest.approx(5.0, abs=0.25)  # four standard deviations
    without = [repeated_random_subset(20, 10, epoch, 0) for epoch in range(2)]
    assert not set(without[0].tolist()) & set(without[1].tolist())


def test_nothing_and_everything_are_subsets() -> None:
    assert repeated_random_subset(5, 0, 3, 0).tolist() == []
    assert repeated_random_subset(0, 0, 0, 0).tolist() == []
    assert repeated_random_subset(5, 5, 3, 0).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("count", "epoch", "message"), [(6, 0, "count"), (-1, 0, "count"), (3, -1, "epoch")])
def test_wrong_numbers_raise(count: int, epoch: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        repeated_random_subset(5, count, epoch, 0)
