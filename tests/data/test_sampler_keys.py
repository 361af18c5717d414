"""What samplers yield: integers of every kind are indices; what a key of another kind means is not guessed."""

import random
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
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

from lightning_grad.callbacks import DataPruning, InfoBatch, RepeatedRandomSubset
from lightning_grad.data import PrunableBatchSampler
from lightning_grad.data.sampler_keys import KeyReader, refuse_other_keys
from lightning_grad.testing import make_classifier, make_data, make_trainer

TOTAL = 40


class Plan(Sampler[Any]):
    """Yields what a plan says."""

    def __init__(self, keys: list[Any]) -> None:
        self.keys = keys
        self.iterations = 0

    def __iter__(self) -> Iterator[Any]:
        self.iterations += 1
        return iter(self.keys)

    def __len__(self) -> int:
        return len(self.keys)


FOREIGN: dict[str, Any] = {
    "an index and a crop": lambda i: (i, i % 3),
    "a tuple of one": lambda i: (i,),
    "a dict": lambda i: {"index": i},
    "a string": lambda i: str(i),
    "bytes": lambda i: bytes([i]),
    "a number": lambda i: float(i),
    "a boolean": lambda i: bool(i % 2),
    "numpy's boolean": lambda i: np.bool_(i % 2),
    "a tensor of one": lambda i: torch.tensor([i]),
    "a tensor of reals": lambda i: torch.tensor(float(i)),
    "an array of one": lambda i: np.array([i]),
    "a slice": lambda i: slice(i, i + 1),
    "none": lambda i: None,
}
BEYOND: dict[str, Any] = {
    "ids from 1": lambda i: i + 1,
    "ids far away": lambda i: 10**12 + i,
    "negative": lambda i: i - 1,
    "one wrong in the middle": lambda i: 99 if i == 17 else i,
    "numpy's ids from 1": lambda i: np.int64(i + 1),
}
ORDINARY: dict[str, Any] = {
    "integers": lambda i: i,
    "numpy's integers": lambda i: np.int64(i),
    "small integers": lambda i: np.uint8(i),
    "tensors": lambda i: torch.tensor(i),
    "arrays": lambda i: np.array(i),
}


@pytest.mark.parametrize("kind", ORDINARY)
def test_integers_of_every_kind_are_indices(kind: str) -> None:
    keys = [ORDINARY[kind](i) for i in range(TOTAL)]
    reader = KeyReader(TOTAL, Plan(keys), "Pruning")
    assert reader.batch(keys) == list(range(TOTAL))
    assert all(type(index) is int for index in reader.batch(keys))
    refuse_other_keys(BatchSampler(Plan(keys), 4, False), range(TOTAL), "Pruning")
    sampler = PrunableBatchSampler(BatchSampler(Plan(keys), 4, False), TOTAL)
    sampler.keep(torch.arange(0, TOTAL, 2))
    assert [index for batch in sampler for index in batch] == list(range(0, TOTAL, 2))


@pytest.mark.parametrize("form", [list, tuple, torch.tensor, np.array])
def test_batches_may_be_lists_tensors_and_arrays_and_are_passed_on_as_they_are(form: Any) -> None:
    batches = Plan([form([2 * number, 2 * number + 1]) for number in range(4)])
    batches.batch_size = 2  # type: ignore[attr-defined]
    sampler = PrunableBatchSampler(batches, 8)
    drawing = iter(sampler)
    assert next(drawing) is batches.keys[0]
    assert drawing.drawn.popleft() == [0, 1]
    sampler.keep(torch.tensor([0, 2, 6]))
    assert list(sampler) == [[0, 2], [6]]


@pytest.mark.parametrize("kind", [*FOREIGN, *BEYOND])
def test_other_keys_are_refused_whoever_reads_them(kind: str) -> None:
    make, error = (FOREIGN[kind], TypeError) if kind in FOREIGN else (BEYOND[kind], ValueError)
    keys = [make(i) for i in range(TOTAL)]
    says = r"^Pruning identifies samples by index, an integer from 0 to 39, but Plan yields .*__getitem__ look up"
    with pytest.raises(error, match=says):
        refuse_other_keys(BatchSampler(Plan(keys), 4, False), range(TOTAL), "Pruning")
    for kept in (None, torch.arange(TOTAL)):
        sampler = PrunableBatchSampler(BatchSampler(Plan(keys), 4, False), TOTAL, "Pruning")
        sampler.keep(kept)
        with pytest.raises(error, match=says):
            list(sampler)


def test_a_long_key_is_not_shown_whole() -> None:
    with pytest.raises(TypeError) as caught:
        KeyReader(TOTAL, Plan([]), "Pruning").one("x" * 10_000)
    assert len(str(caught.value)) < 400


KNOWN: dict[str, Any] = {
    "in order": lambda n: SequentialSampler(range(n)),
    "random": lambda n: RandomSampler(range(n)),
    "weighted": lambda n: WeightedRandomSampler([1.0] * n, n),
    "distributed": lambda n: DistributedSampler(range(n), 2, 0),  # type: ignore[arg-type]
    "subset": lambda n: SubsetRandomSampler(range(n)),
}


@pytest.mark.parametrize("kind", KNOWN)
def test_samplers_of_torch_are_known_without_drawing_from_them(kind: str) -> None:
    state = torch.get_rng_state()
    for fits in (TOTAL, TOTAL - 1):
        refuse_other_keys(BatchSampler(KNOWN[kind](fits), 4, False), range(TOTAL), "Pruning")
    with pytest.raises(ValueError, match=r"an integer from 0 to 39, but .* yields 40"):
        refuse_other_keys(BatchSampler(KNOWN[kind](TOTAL + 1), 4, False), range(TOTAL), "Pruning")
    assert torch.equal(torch.get_rng_state(), state)


def test_a_subset_of_keys_is_refused() -> None:
    sampler = SubsetRandomSampler([(0, 1), (1, 1)])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"SubsetRandomSampler yields \(0, 1\)"):
        refuse_other_keys(BatchSampler(sampler, 4, False), range(TOTAL), "Pruning")


class Random(Sampler[int]):
    """Draws from every stream, its own included, and knows how often it was asked."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.generator = torch.Generator().manual_seed(1)
        self.rng = np.random.default_rng(2)
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        order = torch.randperm(TOTAL, generator=self.generator)[torch.randperm(TOTAL)].tolist()
        for _ in range(random.randrange(9) + np.random.randint(9) + int(self.rng.integers(9))):
            random.shuffle(order)
        yield from order

    def __len__(self) -> int:
        return TOTAL


class NotCopied(list[int]):
    def __deepcopy__(self, memo: Any) -> Any:
        raise AssertionError("a data set was copied")


@pytest.mark.parametrize("wrapped", [True, False])
def test_looking_at_a_sampler_leaves_no_trace(wrapped: bool) -> None:
    data: Any = NotCopied(range(TOTAL))
    whole = torch.utils.data.Subset(data, range(TOTAL)) if wrapped else data

    def drawn(look: bool) -> list[list[int]]:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        sampler = BatchSampler(Random(data), 4, False)
        if look:
            refuse_other_keys(sampler, whole, "Pruning")
        return [*list(sampler), *list(sampler), [sampler.sampler.epoch]]  # type: ignore[attr-defined]

    assert drawn(look=True) == drawn(look=False)


class Knowing(Plan):
    """Knows what must not be copied."""

    def __init__(self, keys: list[Any]) -> None:
        super().__init__(keys)
        self.trainer = NotCopied()


def test_what_a_sampler_knows_of_the_run_is_not_copied() -> None:
    sampler = Knowing(["a"])
    with pytest.raises(TypeError, match="Knowing yields 'a'"):
        refuse_other_keys(BatchSampler(sampler, 4, False), range(TOTAL), "Pruning", [sampler.trainer])


class Endless(Sampler[int]):
    """Has more keys in an epoch than memory could hold."""

    def __iter__(self) -> Iterator[int]:
        while True:
            yield 3

    def __len__(self) -> int:
        return 10**15


def test_a_sampler_without_end_is_read_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_grad.data.sampler_keys._MOST_READ", 1000)
    refuse_other_keys(BatchSampler(Endless(), 4, False), range(TOTAL), "Pruning")


class Locked(Plan):
    """Cannot be copied."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("cannot copy a lock")


def test_a_sampler_that_cannot_be_copied_is_read_when_it_is_drawn_from() -> None:
    original = BatchSampler(Locked([*range(TOTAL - 1), TOTAL]), 4, False)
    refuse_other_keys(original, range(TOTAL), "Pruning")
    drawing = iter(PrunableBatchSampler(original, TOTAL))
    for first in range(0, TOTAL - 4, 4):
        assert next(drawing) == list(range(first, first + 4))
    with pytest.raises(ValueError, match="Locked yields 40"):
        next(drawing)


# In a fit.


class Steps(pl.Callback):
    """Counts training steps."""

    count = 0

    def on_train_batch_end(self, *arguments: Any) -> None:
        self.count += 1


class ByKey(torch.utils.data.Dataset[Any]):
    """Takes keys: an index and how far the image is moved, or an id from 1."""

    def __init__(self, crops: bool) -> None:
        self.base, self.crops = make_data(), crops

    def __len__(self) -> int:
        return TOTAL

    def __getitem__(self, key: Any) -> Any:
        index, moved = key if self.crops else (key - 1, 0)
        x, y = self.base[index]
        return torch.roll(x, moved), y


class ByIndex(torch.utils.data.Dataset[Any]):
    """The way out of the refusal: looks the key up."""

    def __init__(self, keyed: ByKey) -> None:
        self.keyed = keyed

    def __len__(self) -> int:
        return len(self.keyed)

    def __getitem__(self, index: int) -> Any:
        return self.keyed[(index, index % 3) if self.keyed.crops else index + 1]


@pytest.mark.parametrize("technique", ["data pruning", "random subsets", "infobatch", "random pruning"])
@pytest.mark.parametrize("crops", [True, False])
def test_keys_are_refused_before_the_first_batch_and_the_way_out_works(technique: str, crops: bool) -> None:
    makers: dict[str, Any] = {
        "data pruning": lambda: DataPruning(0.5, epoch=1, num_shown=0, figure=False),
        "random pruning": lambda: DataPruning(0.5, keep="random", epoch=0),
        "random subsets": RepeatedRandomSubset,
        "infobatch": InfoBatch,
    }
    make = makers[technique]
    keyed = ByKey(crops)
    keys = [(i, i % 3) if crops else i + 1 for i in range(TOTAL)]

    def steps(data: Any, sampler: Any) -> int:
        counter = Steps()
        try:
            trainer = make_trainer(callbacks=[make(), counter], max_epochs=2)
            trainer.fit(make_classifier(), DataLoader(data, 8, sampler=sampler))
        finally:
            counted.append(counter.count)
        return counter.count

    counted: list[int] = []
    with pytest.raises(TypeError if crops else ValueError, match=r"^\w+ identifies samples by index.*Plan yields"):
        steps(keyed, Plan(keys))
    assert counted == [0]
    assert 5 <= steps(ByIndex(keyed), Plan(list(range(TOTAL)))) <= 10
