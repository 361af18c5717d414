"""What is drawn of a pruned data set: bitwise the original before anything is kept, and in its way afterwards."""

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_grad.data import PrunableBatchSampler
from lightning_grad.data.prunable_sampler import RecordedBatches
from tests.cases import cases

TOTAL, BATCH = 23, 4
KEPT = [1, 2, 5, 7, 8, 11, 13, 17, 18, 22]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def flat(batches: Any) -> list[int]:
    return [int(index) for batch in batches for index in batch]


def sizes(batches: Any) -> list[int]:
    return [len(batch) for batch in batches]


def wrap(sampler: Any, batch_size: int = BATCH, drop_last: bool = False, total: int = TOTAL) -> PrunableBatchSampler:
    return PrunableBatchSampler(BatchSampler(sampler, batch_size, drop_last), total)


class EvensFirst(Sampler[int]):
    """A sampler of nobody's library."""

    def __len__(self) -> int:
        return TOTAL

    def __iter__(self) -> Iterator[int]:
        yield from range(0, TOTAL, 2)
        yield from range(1, TOTAL, 2)


class Backwards(BatchSampler):
    """A user's subclass that walks in a way of its own, whatever its sampler yields."""

    def __iter__(self) -> Iterator[list[int]]:
        order = list(range(TOTAL - 1, -1, -1))
        whole = len(self) * self.batch_size
        yield from (order[start : start + self.batch_size] for start in range(0, whole, self.batch_size))


class Buckets(Sampler[Any]):
    """Batches within buckets, so that every bucket has a last batch which is not full; no sampler, no drop_last."""

    def __init__(self, kind: Callable[[list[int]], Any] = list) -> None:
        self.batch_size = BATCH
        self.epoch = 0
        self._kind = kind

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 7

    def __iter__(self) -> Iterator[Any]:
        for bucket in (range(10), range(10, TOTAL)):
            order = [bucket[p] for p in torch.randperm(len(bucket), generator=seeded(self.epoch))]
            for start in range(0, len(order), BATCH):
                yield self._kind(order[start : start + BATCH])


ORIGINALS: dict[str, Callable[[], Any]] = {
    "sequential": lambda: BatchSampler(SequentialSampler(range(TOTAL)), BATCH, False),
    "sequential, drop_last": lambda: BatchSampler(SequentialSampler(range(TOTAL)), BATCH, True),
    "random": lambda: BatchSampler(RandomSampler(range(TOTAL)), BATCH, False),
    "random, drop_last": lambda: BatchSampler(RandomSampler(range(TOTAL)), BATCH, True),
    "random, generator": lambda: BatchSampler(RandomSampler(range(TOTAL), generator=seeded()), BATCH, False),
    "random, replacement": lambda: BatchSampler(RandomSampler(range(TOTAL), True, 31), BATCH, False),
    "random, num_samples": lambda: BatchSampler(RandomSampler(range(TOTAL), num_samples=50), BATCH, False),
    "subset": lambda: BatchSampler(SubsetRandomSampler(range(9, 20)), BATCH, False),
    "weighted": lambda: BatchSampler(WeightedRandomSampler(range(1, TOTAL + 1), 17), BATCH, False),
    "distributed": lambda: BatchSampler(DistributedSampler(range(TOTAL), 2, 1), BATCH, False),
    "unknown": lambda: BatchSampler(EvensFirst(), BATCH, False),
    "own batches": lambda: Backwards(SequentialSampler(range(TOTAL)), BATCH, False),
    "buckets": Buckets,
}


# Before anything is pruned it is the original.


@pytest.mark.parametrize("name", ORIGINALS)
def test_before_keep_it_is_bitwise_the_original(name: str) -> None:
    torch.manual_seed(5)
    original = ORIGINALS[name]()
    expected = [list(original) for _ in range(3)]
    length, after = len(original), torch.get_rng_state()
    torch.manual_seed(5)
    sampler = PrunableBatchSampler(ORIGINALS[name](), TOTAL)
    found = [list(sampler) for _ in range(3)]
    assert found == expected
    assert len(sampler) == sampler.full_length == length
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("name", ["random", "random, generator", "weighted"])
@pytest.mark.parametrize("workers", [0, 2])
def test_before_keep_a_loader_gives_the_same_data_and_leaves_the_same_random_state(name: str, workers: int) -> None:
    results = []
    for stand_in in (False, True):
        torch.manual_seed(5)
        loader = DataLoader(range(TOTAL), batch_sampler=ORIGINALS[name](), num_workers=workers)  # type: ignore[arg-type]
        if stand_in:
            loader.__dict__["batch_sampler"] = PrunableBatchSampler(loader.batch_sampler, TOTAL)
        results.append(([batch.tolist() for _ in range(2) for batch in loader], torch.get_rng_state().tolist()))
    assert results[0] == results[1]


@pytest.mark.parametrize("name", ["random", "random, generator", "buckets", "distributed"])
def test_keeping_all_again_gives_the_original_back(name: str) -> None:
    sampler = PrunableBatchSampler(ORIGINALS[name](), TOTAL)
    sampler.keep(KEPT)
    sampler.keep(None)
    torch.manual_seed(1)
    found = list(sampler)
    torch.manual_seed(1)
    assert found == list(ORIGINALS[name]())
    assert len(sampler) == len(found)


# What is promised for every sampler.


ALONE = [name for name in ORIGINALS if name != "distributed"]


@cases("name", ORIGINALS)
@cases("samples", [None, 7, 23, 61])
@cases("kept", [KEPT, [9, 10, 11], [3, 3, 10, 10, 10, 12]])
def test_the_length_is_the_number_of_batches(name: str, samples: int | None, kept: list[int]) -> None:
    sampler = PrunableBatchSampler(ORIGINALS[name](), TOTAL)
    sampler.keep(kept, samples)
    for _ in range(2):
        batches = list(sampler)
        assert len(batches) == len(sampler)
        assert set(flat(batches)) <= set(kept)
        assert set(sizes(batches[:-1])) <= {BATCH}, "only the last batch may be smaller"
        if samples is not None:
            dropped = samples % BATCH if sampler.drop_last else 0
            assert sum(sizes(batches)) == sampler.samples - dropped == samples - dropped


ONCE = ["sequential", "random", "random, generator", "unknown", "own batches"]


@pytest.mark.parametrize("name", ONCE)
def test_one_pass_has_every_kept_sample_once(name: str) -> None:
    sampler = PrunableBatchSampler(ORIGINALS[name](), TOTAL)
    sampler.keep(torch.tensor(KEPT))
    assert sorted(flat(sampler)) == KEPT
    assert sizes(sampler) == [4, 4, 2]
    assert len(sampler) == 3
    assert sampler.samples == 10


@pytest.mark.parametrize("name", ONCE)
def test_an_index_that_stands_there_twice_is_drawn_twice(name: str) -> None:
    kept = [*range(TOTAL), 4, 4, 9]
    sampler = PrunableBatchSampler(ORIGINALS[name](), TOTAL)
    sampler.keep(kept)
    assert Counter(flat(sampler)) == Counter(kept)
    assert sizes(sampler) == [4] * 6 + [2]


def test_of_an_unknown_sampler_the_second_copies_come_in_a_second_round() -> None:
    sampler = wrap(EvensFirst())
    sampler.keep([3, 4, 4, 3, 8])
    assert flat(sampler) == [4, 8, 3, 4, 3]


@pytest.mark.parametrize("name", ALONE)
def test_several_passes_are_whole_and_exactly_as_long_as_asked(name: str) -> None:
    sampler = PrunableBatchSampler(ORIGINALS[name](), TOTAL)
    sampler.keep([9, 11, 13, 16, 18], samples=12)
    drawn = flat(sampler)
    assert len(drawn) == 12
    if "replacement" not in name and "weighted" not in name and "num_samples" not in name:
        assert sorted(drawn[:5]) == sorted(drawn[5:10]) == [9, 11, 13, 16, 18]


@pytest.mark.parametrize("name", ["random", "random, generator", "subset", "distributed"])
def test_each_pass_is_shuffled_in_another_way(name: str) -> None:
    torch.manual_seed(0)
    sampler = PrunableBatchSampler(ORIGINALS[name](), TOTAL)
    kept = list(range(10, 20))
    sampler.keep(kept, samples=40)
    drawn, one = flat(sampler), 5 if name == "distributed" else 10
    passes = [tuple(drawn[start : start + one]) for start in range(0, 40, one)]
    assert len(set(passes)) == len(passes)


def test_a_choice_holds_from_the_next_iterator_on() -> None:
    sampler = wrap(SequentialSampler(range(TOTAL)))
    before = iter(sampler)
    assert next(before) == [0, 1, 2, 3]
    sampler.keep([20, 21])
    assert next(before) == [4, 5, 6, 7]
    assert list(sampler) == [[20, 21]]


# Each row of the table.


def test_sequential_keeps_the_order_that_is_given() -> None:
    sampler = wrap(SequentialSampler(range(TOTAL)))
    sampler.keep([5, 2, 9, 9, 1])
    assert list(sampler) == [[5, 2, 9, 9], [1]]
    sampler = wrap(SequentialSampler(range(TOTAL)), drop_last=True)
    sampler.keep([5, 2, 9, 9, 1])
    assert list(sampler) == [[5, 2, 9, 9]]


def test_random_shuffles_by_the_generator_of_the_original() -> None:
    sampler = wrap(RandomSampler(range(TOTAL), generator=seeded(3)))
    sampler.keep(KEPT)
    reference = RandomSampler(range(len(KEPT)), generator=seeded(3))
    state = torch.get_rng_state()
    for _ in range(3):
        assert flat(sampler) == [KEPT[position] for position in islice(reference, len(KEPT))]
    assert torch.equal(torch.get_rng_state(), state), "a sampler with a generator leaves the global one alone"


def test_random_without_generator_draws_from_the_global_one() -> None:
    sampler = wrap(RandomSampler(range(TOTAL)))
    sampler.keep(KEPT)
    torch.manual_seed(8)
    found = flat(sampler)
    torch.manual_seed(8)
    assert found == [KEPT[position] for position in RandomSampler(range(len(KEPT)))]


def test_random_with_replacement_draws_in_proportion() -> None:
    sampler = wrap(RandomSampler(range(TOTAL), True, 23 * 40, seeded()))
    sampler.keep(KEPT)
    drawn = Counter(flat(sampler))
    assert sampler.samples == sum(drawn.values()) == 400
    assert set(drawn) == set(KEPT)
    assert len(set(drawn.values())) > 1, "with replacement, not one pass after the other"
    assert all(15 < count < 70 for count in drawn.values())


def test_random_with_fewer_samples_than_the_set_draws_that_share() -> None:
    sampler = wrap(RandomSampler(range(20), num_samples=10, generator=seeded()), total=20)
    sampler.keep(range(8))
    drawn = flat(sampler)
    assert len(drawn) == sampler.samples == 4
    assert len(set(drawn)) == 4
    assert set(drawn) <= set(range(8))


def test_subset_stays_within_its_subset() -> None:
    sampler = wrap(SubsetRandomSampler([4, 8, 11, 2, 17], seeded(2)))
    assert sampler.population.tolist() == [2, 4, 8, 11, 17]
    sampler.keep([1, 2, 8, 8, 9, 17])
    orders = {tuple(flat(sampler)) for _ in range(20)}
    assert all(sorted(order) == [2, 8, 8, 17] for order in orders)
    assert len(orders) > 3
    assert sampler.samples == 4


def test_population_is_everything_elsewhere() -> None:
    for name in ("random", "unknown", "buckets", "distributed"):
        assert PrunableBatchSampler(ORIGINALS[name](), TOTAL).population.tolist() == list(range(TOTAL))


def test_weighted_never_draws_a_pruned_sample_and_follows_the_weights() -> None:
    weights = torch.arange(10, dtype=torch.float64)
    sampler = wrap(WeightedRandomSampler(weights, 20_000, True, seeded()), total=10)
    kept = torch.tensor([0, 2, 3, 9])
    sampler.keep(kept)
    drawn = Counter(flat(sampler))
    assert sum(drawn.values()) == 8_000
    assert set(drawn) == {2, 3, 9}, "neither a pruned one nor one of weight zero"
    for index in (2, 3, 9):
        share = float(weights[index] / weights[kept].sum())
        deviation = (share * (1 - share) / 8_000) ** 0.5
        assert abs(drawn[index] / 8_000 - share) < 5 * deviation


def test_weighted_without_replacement_draws_each_once() -> None:
    sampler = wrap(WeightedRandomSampler([1.0] * 10, 10, False, seeded()), total=10)
    sampler.keep([1, 4, 6])
    assert sorted(flat(sampler)) == [1, 4, 6]


def test_weighted_without_replacement_draws_no_more_than_have_weight() -> None:
    weights = [1.0] * 5 + [0.0] * 5
    sampler = wrap(WeightedRandomSampler(weights, 5, False, seeded()), total=10)
    sampler.keep([0, 6, 7, 8])
    assert list(sampler) == [[0]]
    assert len(sampler) == 1


def test_unknown_samplers_keep_their_order() -> None:
    sampler = wrap(EvensFirst())
    sampler.keep([1, 2, 3, 4, 20])
    assert list(sampler) == [[2, 4, 20, 1], [3]]


def test_a_subclass_of_batch_sampler_is_asked_itself() -> None:
    sampler = PrunableBatchSampler(ORIGINALS["own batches"](), TOTAL)
    sampler.keep([1, 2, 3, 4, 20])
    assert list(sampler) == [[20, 4, 3, 2], [1]]


def test_buckets_are_filtered_and_refilled() -> None:
    sampler = PrunableBatchSampler(Buckets(), TOTAL)
    sampler.keep(KEPT)
    order = [index for index in flat(Buckets()) if index in KEPT]
    # 7 batches of 4, though not all are full, for 23 samples: with 10 of them it is 12 samples, the last 2 once more.
    assert list(sampler) == [order[:4], order[4:8], order[8:] + order[:2]]


@pytest.mark.parametrize("kind", [tuple, torch.tensor, np.array], ids=["tuple", "tensor", "array"])
def test_batches_of_any_kind_are_filtered(kind: Any) -> None:
    sampler = PrunableBatchSampler(Buckets(kind), TOTAL)
    sampler.keep(KEPT)
    expected = PrunableBatchSampler(Buckets(), TOTAL)
    expected.keep(KEPT)
    assert list(sampler) == list(expected)


def test_batches_of_its_own_have_as_many_samples_as_are_kept() -> None:
    """No other number, whose last batch might be of one sample: the length of the original is known in batches only."""
    for kept in range(4, TOTAL + 1):
        for original in (ORIGINALS["own batches"](), Backwards(SequentialSampler(range(TOTAL)), BATCH, True)):
            sampler = PrunableBatchSampler(original, TOTAL)
            sampler.keep(range(kept))
            whole = kept - kept % BATCH if original.drop_last else kept
            assert sum(sizes(sampler)) == whole


def test_what_others_ask_of_a_batch_sampler_reaches_the_original() -> None:
    original = Buckets()
    sampler = PrunableBatchSampler(original, TOTAL)
    sampler.set_epoch(3)
    assert original.epoch == 3
    assert flat(sampler) == flat(original)
    assert not hasattr(sampler, "unheard_of")


# Several ranks.


def ranks(number: int, kept: Any, samples: int | None = None, **arguments: Any) -> list[PrunableBatchSampler]:
    every = [wrap(DistributedSampler(range(TOTAL), number, rank, **arguments)) for rank in range(number)]
    for sampler in every:
        sampler.keep(kept, samples)
    return every


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_ranks_share_the_kept_list_and_have_equal_epochs(number: int, drop_last: bool, shuffle: bool) -> None:
    for count in range(number, TOTAL + 1):
        kept = torch.randperm(TOTAL, generator=seeded(count))[:count].tolist()
        every = ranks(number, kept, drop_last=drop_last, shuffle=shuffle)
        drawn = [flat(sampler) for sampler in every]
        assert len({len(sampler) for sampler in every}) == 1
        assert len({len(indices) for indices in drawn}) == 1
        assert all(len(list(sampler)) == len(sampler) for sampler in every)
        times = Counter(index for indices in drawn for index in indices)
        if drop_last:
            assert set(times) <= set(kept)
            assert set(times.values()) == {1}
            assert len(times) == count - count % number
        else:
            assert set(times) == set(kept)
            assert sum(times.values()) == -(-count // number) * number


def test_fewer_samples_than_ranks_are_repeated() -> None:
    drawn = [flat(sampler) for sampler in ranks(3, [6])]
    assert drawn == [[6], [6], [6]]


def test_the_epoch_that_lightning_sets_on_the_original_reshuffles_all_ranks() -> None:
    every, seen = ranks(2, KEPT), set()
    for epoch in range(6):
        for sampler in every:
            sampler.sampler.set_epoch(epoch)
        drawn = [flat(sampler) for sampler in every]
        assert sorted(drawn[0] + drawn[1]) == KEPT
        seen.add(tuple(drawn[0]))
        assert drawn == [flat(sampler) for sampler in every], "the same until the epoch is set"
    assert len(seen) == 6


def test_passes_of_one_epoch_are_not_those_of_another_and_agree_among_ranks() -> None:
    every, seen = ranks(2, KEPT, samples=15), []
    for epoch in range(4):
        for sampler in every:
            sampler.sampler.set_epoch(epoch)
        first, second = (flat(sampler) for sampler in every)
        for start in (0, 5, 10):
            assert sorted(first[start : start + 5] + second[start : start + 5]) == KEPT
            seen.append(tuple(first[start : start + 5]))
    assert len(set(seen)) == 12


def test_samples_and_ranks_count_this_process() -> None:
    sampler = ranks(2, KEPT)[0]
    assert sampler.ranks == 2
    assert sampler.full_samples == 12
    assert sampler.samples == 5
    assert sampler.full_length == 3
    assert wrap(EvensFirst()).ranks == 1


class Hashing(DistributedSampler[int]):
    """Shares among ranks in a way of its own."""


def test_shares_that_are_not_known_are_said_to_be() -> None:
    assert wrap(RandomSampler(range(TOTAL))).shares_are_known
    assert wrap(DistributedSampler(range(TOTAL), 2, 0)).shares_are_known
    assert not wrap(EvensFirst()).shares_are_known
    assert not PrunableBatchSampler(Buckets(), TOTAL).shares_are_known
    assert not PrunableBatchSampler(ORIGINALS["own batches"](), TOTAL).shares_are_known
    with pytest.raises(
        TypeError,
        match="PrunableBatchSampler cannot follow the samples of Hashing, because it is unknown how it splits them",
    ):
        wrap(Hashing(range(TOTAL), 2, 0))
    alone = wrap(Hashing(range(TOTAL), 1, 0, shuffle=False))
    alone.keep(KEPT)
    assert flat(alone) == KEPT


# Errors.


@pytest.mark.parametrize("kept", [[], torch.tensor([])], ids=["list", "tensor"])
def test_something_must_be_kept(kept: Any) -> None:
    sampler = wrap(SequentialSampler(range(TOTAL)))
    with pytest.raises(ValueError, match="At least one sample must be kept; got none"):
        sampler.keep(kept)


@pytest.mark.parametrize("kept", [[0, TOTAL], [-1, 3]])
def test_indices_lie_in_the_data_set(kept: list[int]) -> None:
    sampler = wrap(SequentialSampler(range(TOTAL)))
    sampler.keep([4])
    with pytest.raises(ValueError, match=f"between 0 and {TOTAL - 1}; got {min(kept)} to {max(kept)}"):
        sampler.keep(kept)
    assert list(sampler) == [[4]], "what is refused changes nothing"


class NoSize:
    def __iter__(self) -> Iterator[list[int]]:
        yield from ([0, 1, 2], [3, 4])


def test_batches_of_unknown_size_are_refused_and_the_way_out_works() -> None:
    with pytest.raises(
        TypeError,
        match=r"RS2 needs the number of samples in a batch, but NoSize has no batch_size\. Give it an attribute",
    ):
        PrunableBatchSampler(NoSize(), 5, "RS2")

    class Size(NoSize):
        batch_size = 3

    with pytest.raises(TypeError, match=r"RS2 needs the number of batches.*Size has no __len__\. Give it"):
        PrunableBatchSampler(Size(), 5, "RS2")

    class Length(Size):
        def __len__(self) -> int:
            return 2

    sampler = PrunableBatchSampler(Length(), 5, "RS2")
    assert list(sampler) == [[0, 1, 2], [3, 4]]
    sampler.keep([1, 2, 3, 4])
    assert list(sampler) == [[1, 2, 3], [4]]


def test_samples_that_the_original_never_yields_are_an_error_and_no_endless_loop() -> None:
    class Low(EvensFirst):
        def __iter__(self) -> Iterator[int]:
            yield from range(5)

    sampler = wrap(Low())
    sampler.keep([10, 11, 12])
    with pytest.raises(ValueError, match=r"keeps 3 samples, but BatchSampler yields none of them\. Prune"):
        list(sampler)


def test_samples_outside_of_the_subset_are_an_error() -> None:
    sampler = wrap(SubsetRandomSampler([4, 8, 11]))
    sampler.keep([1, 2], samples=6)
    with pytest.raises(ValueError, match="keeps 2 samples, but BatchSampler yields none of them"):
        list(sampler)


# What was drawn.


def test_recorded_batches_are_put_aside_in_order() -> None:
    batches = RecordedBatches(iter([[3, 1], [2], [0]]))
    assert next(batches) == [3, 1]
    assert next(batches) == [2]
    assert list(batches.drawn) == [[3, 1], [2]]
    batches.drawn.popleft()
    assert list(batches) == [[0]]
    assert list(batches.drawn) == [[2], [0]]
    with pytest.raises(StopIteration):
        next(batches)


def test_the_latest_iterator_is_known_and_the_one_before_lives_on() -> None:
    sampler = wrap(SequentialSampler(range(TOTAL)))
    first = iter(sampler)
    next(first)
    second = iter(sampler)
    assert sampler.latest is second
    assert not second.drawn
    next(first)
    assert list(first.drawn) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_workers_that_draw_ahead_give_batches_in_the_order_drawn() -> None:
    sampler = wrap(RandomSampler(range(TOTAL), generator=seeded()))
    sampler.keep(KEPT, samples=30)
    loader = DataLoader(range(TOTAL), BATCH, num_workers=2)  # type: ignore[arg-type]
    loader.__dict__["batch_sampler"] = sampler
    batches: list[Tensor] = list(loader)
    assert [batch.tolist() for batch in batches] == list(sampler.latest.drawn)
