"""Shortened loaders keep the class, the collate function and the kind of sampler of the user's, and are short."""

from typing import Any

import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_grad.cli.check.short_data import shortened
from tests.cases import cases
from tests.contract.odd_projects import Counted, Feed, Keys, Lists, Uncounted

DATA = TensorDataset(torch.arange(100.0))


class OwnLoader(DataLoader[Any]):
    """A loader whose arguments are not those of DataLoader."""

    def __init__(self, text: str) -> None:
        super().__init__(DATA, 8, shuffle=True, num_workers=2, persistent_workers=True, collate_fn=self.join)
        self.text = text

    def join(self, items: Any) -> Any:
        return self.text, torch.stack([item[0] for item in items])


class Slotted:
    __slots__ = ("size",)

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> float:
        return float(index)


class Cards(IterableDataset[int]):
    def __init__(self, length: int | None = None) -> None:
        self.length = length

    def __iter__(self) -> Any:
        return iter(range(1000))


class CountedCards(Cards):
    def __len__(self) -> int:
        return 1000


LOADERS = {
    "sequential": DataLoader(DATA, 8),
    "shuffled": DataLoader(DATA, 8, shuffle=True),
    "random_with_replacement": DataLoader(DATA, 8, sampler=RandomSampler(DATA, True, 60)),
    "weighted": DataLoader(DATA, 8, sampler=WeightedRandomSampler([1.0] * 100, 100)),
    "a_part": DataLoader(DATA, 8, sampler=SubsetRandomSampler(range(50, 90))),
    "batch_sampler": DataLoader(DATA, batch_sampler=BatchSampler(SubsetRandomSampler(range(90)), 8, False)),
    "own_batch_sampler": DataLoader(DATA, batch_sampler=Counted()),
    "uncounted_batches": DataLoader(DATA, batch_sampler=Uncounted()),
    "lists_of_indices": DataLoader(Lists(), batch_size=None, sampler=Counted()),
    "keys_in_a_list": DataLoader(DATA, 8, sampler=Keys(list(range(99, 0, -1)))),
    "list": DataLoader(list(range(100)), 8),
    "slots": DataLoader(Slotted(100), 8, shuffle=True),
    "stream": DataLoader(Cards(), 8),
    "counted_stream": DataLoader(CountedCards(), 8),
    "stream_of_batches": DataLoader(Cards(), batch_size=None),
}
SIZES = {"stream_of_batches": 1}


@cases("name", LOADERS)
def test_a_shortened_loader_yields_two_batches_and_keeps_its_kind(name: str) -> None:
    loader = LOADERS[name]
    short = shortened(loader, 2)
    batches = list(short)
    assert len(batches) == 2
    size = SIZES.get(name, 8)
    for batch in batches:
        first = batch[0] if isinstance(batch, list) else batch
        assert torch.as_tensor(first).numel() in (size, size * 4 * 16)
    assert type(short) is type(loader)
    assert short.collate_fn == loader.collate_fn
    for slot in ("sampler", "batch_sampler", "dataset"):
        assert isinstance(getattr(short, slot), type(getattr(loader, slot))) or name == "slots"
        assert type(getattr(short, slot)).__name__ == type(getattr(loader, slot)).__name__
    assert hasattr(short.dataset, "__len__") == hasattr(loader.dataset, "__len__")
    if hasattr(short.dataset, "__len__") and not isinstance(short.dataset, IterableDataset):
        assert len(short.dataset) == 2 * size
    assert list(short), "a second epoch"


def test_the_original_is_unchanged() -> None:
    loader = LOADERS["shuffled"]
    shortened(loader, 2)
    assert (len(loader), len(loader.dataset), len(loader.sampler)) == (13, 100, 100)


def test_a_loader_of_a_class_with_other_arguments() -> None:
    short = shortened(OwnLoader("hello"), 3)
    assert (type(short), len(short), short.num_workers) == (OwnLoader, 3, 0)
    assert [text for text, _ in short] == ["hello"] * 3
    shuffled = torch.cat([values for _, values in short]).int().tolist()
    assert sorted(shuffled) == list(range(24))
    assert shuffled != list(range(24))


def test_samplers_of_torch_stay_exactly_what_they_are() -> None:
    assert type(shortened(LOADERS["sequential"], 2).sampler) is SequentialSampler
    assert type(shortened(LOADERS["shuffled"], 2).sampler) is RandomSampler
    drawn = shortened(LOADERS["random_with_replacement"], 2).sampler
    assert type(drawn) is RandomSampler
    assert (drawn.replacement, len(drawn)) == (True, 16)


def test_what_a_sampler_draws_is_what_is_trained_on() -> None:
    short = shortened(DataLoader(DATA, 4, sampler=SubsetRandomSampler([3, 50, 7, 9])), 1)
    assert sorted(short.dataset[index][0].item() for index in short.sampler) == [3, 7, 9, 50]
    assert sorted(torch.cat([batch[0] for batch in short]).tolist()) == [3, 7, 9, 50]


class Letters:
    """A data set that is read by names."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, key: str) -> float:
        return float("abcd".index(key))


def test_keys_that_are_no_indices_stay() -> None:
    short = shortened(DataLoader(Letters(), 1, sampler=Keys("dcba")), 2)
    assert [batch.item() for batch in short] == [3.0, 2.0]
    assert list(short.sampler) == ["d", "c"]


def test_collections_of_loaders() -> None:
    loaders = {"a": LOADERS["sequential"], "b": [LOADERS["shuffled"], Feed()]}
    short = shortened(loaders, 2)
    assert [len(short["a"]), len(short["b"][0])] == [2, 2]
    assert isinstance(short["b"][1], Feed)
    combined = shortened(CombinedLoader({"a": LOADERS["sequential"]}, "max_size"), 2)
    assert (combined._mode, len(combined.iterables["a"])) == ("max_size", 2)
