"""Persistent workers read the batches of a scoring pass, and the training that follows does not notice."""

import os
import random
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, get_worker_info

from lightning_grad.callbacks import DataPruning
from lightning_grad.data import borrowed_workers
from lightning_grad.data.borrowed_workers import BorrowedWorkers, can_borrow
from lightning_grad.testing import make_trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*scores samples that differ each time", "ignore:.*scores at init")
TOTAL, BATCH = 24, 4
PERSISTENT = {"num_workers": 2, "persistent_workers": True, "multiprocessing_context": "fork"}


class Noisy(Dataset[Any]):
    """Every item draws from every random stream that there is, its own included, and tells who has read it."""

    def __init__(self, amount: float = 1.0) -> None:
        self.amount = amount
        self.generators = [torch.Generator().manual_seed(1), np.random.default_rng(2), random.Random(3)]

    def __len__(self) -> int:
        return TOTAL

    def __getitem__(self, index: int) -> Any:
        own: list[Any] = self.generators
        drawn = [torch.rand(()).item(), np.random.rand(), random.random()]
        drawn += [torch.rand((), generator=own[0]).item(), own[1].random(), own[2].random()]
        noise = self.amount * torch.tensor(drawn)
        return torch.full((6,), index / TOTAL) + noise, index % 3, os.getpid()


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        pl.seed_everything(3, verbose=False)
        self.layer = torch.nn.Linear(6, 3)
        self.readers: list[set[int]] = []
        self.seen: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, pids = batch
        if self.trainer.training and self.layer.training:
            self.readers += [set()] * (self.current_epoch - len(self.readers) + 1)
            self.readers[-1] = self.readers[-1] | set(pids.tolist())
            self.seen.append(x.clone())
        return F.cross_entropy(self.layer(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(callbacks: list[Any], amount: float = 1.0, train: Any = None, **arguments: Any) -> Net:
    net = Net()
    given = {"shuffle": True, **PERSISTENT} if train is None else train
    loader = DataLoader(Noisy(amount), BATCH, **given)
    make_trainer(callbacks=callbacks, **{"max_epochs": 3, **arguments}).fit(net, loader)
    return net


def same(one: Net, other: Net) -> bool:
    alike = len(one.seen) == len(other.seen) and all(map(torch.equal, one.seen, other.seen))
    return alike and torch.equal(one.layer.weight, other.layer.weight)


@pytest.fixture
def borrowed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the passes that were read by borrowed workers."""
    passes: list[int] = []
    original = BorrowedWorkers.__iter__

    def noted(self: BorrowedWorkers) -> Iterator[Any]:
        passes.append(len(self))
        return original(self)

    monkeypatch.setattr(BorrowedWorkers, "__iter__", noted)
    return passes


def scoring(prune: Any = 0.0, epoch: Any = 1, **arguments: Any) -> DataPruning:
    return DataPruning(prune, epoch=epoch, num_shown=0, figure=False, **arguments)


@pytest.mark.parametrize("limit", [1.0, 3])
def test_what_follows_a_pass_is_what_it_would_have_been(limit: float, borrowed: list[int]) -> None:
    plain = fit([], limit_train_batches=limit)
    scored = fit([scoring([0.0, 0.0], [1, 2])], limit_train_batches=limit)
    assert borrowed == [TOTAL // BATCH] * 2
    assert same(plain, scored)


def test_the_workers_are_kept(borrowed: list[int]) -> None:
    net = fit([scoring(0.5)])
    assert borrowed == [6]
    assert net.readers[0] == net.readers[1] == net.readers[2]
    assert len(net.readers[0]) == 2
    assert os.getpid() not in net.readers[0]


def test_the_run_is_that_of_no_workers(borrowed: list[int]) -> None:
    own, other = scoring(0.5), scoring(0.5)
    one = fit([own], 0.0, {"shuffle": False})
    assert borrowed == []
    assert same(one, fit([other], 0.0, PERSISTENT))
    assert borrowed == [6]
    assert own.scored is not None
    assert other.scored is not None
    assert torch.equal(own.scored.values, other.scored.values)


def test_the_run_is_that_of_workers_started_for_the_pass(borrowed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    one = fit([scoring(0.5)], 0.0)
    monkeypatch.setattr(borrowed_workers, "_NEEDED", ("a_name_that_torch_lacks",))
    assert same(one, fit([scoring(0.5)], 0.0))
    assert borrowed == [6]


def test_two_passes_see_the_same_and_so_do_workers_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def scores() -> list[Tensor]:
        found = []

        class Still(Net):
            def configure_optimizers(self) -> Any:
                return torch.optim.SGD(self.parameters(), lr=0.0)

        class Note(pl.Callback):
            def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
                if technique.scored is not None:
                    found.append(technique.scored.values)

        technique = scoring([0.0, 0.0], [1, 2])
        net, loader = Still(), DataLoader(Noisy(), BATCH, shuffle=True, **PERSISTENT)
        loader.dataset.generators = [torch.Generator()] * 3  # type: ignore[attr-defined]
        loader.dataset.__class__ = Global
        make_trainer(callbacks=[technique, Note()], max_epochs=3).fit(net, loader)
        return found

    first, second = scores()
    assert torch.equal(first, second)
    monkeypatch.setattr(borrowed_workers, "_NEEDED", ("a_name_that_torch_lacks",))
    assert torch.equal(scores()[0], first)


class Global(Noisy):
    """Draws from the global streams only."""

    def __getitem__(self, index: int) -> Any:
        drawn = torch.tensor([torch.rand(()).item(), np.random.rand(), random.random()] * 2)
        return torch.full((6,), index / TOTAL) + drawn, index % 3, os.getpid()


@pytest.mark.parametrize(("train", "started"), [(PERSISTENT, 1), ({"num_workers": 2}, 4)], ids=["persistent", "not"])
def test_workers_are_started_as_rarely_as_can_be(train: Any, started: int, monkeypatch: pytest.MonkeyPatch) -> None:
    iterators: list[Any] = []
    original = torch.utils.data.dataloader._MultiProcessingDataLoaderIter.__init__

    def noted(self: Any, loader: Any) -> None:
        iterators.append(loader)
        original(self, loader)

    monkeypatch.setattr(torch.utils.data.dataloader._MultiProcessingDataLoaderIter, "__init__", noted)
    fit([scoring(0.5)], train=train)
    assert len(iterators) == started, "one for each epoch and one for the pass, or one for all"


# When they are not borrowed.


class Mixing:
    """A collate function with a generator of its own, which a worker has a copy of."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(5)

    def __call__(self, items: list[Any]) -> Any:
        x, y, pids = torch.utils.data.default_collate(items)
        return x + torch.rand(len(x), 1, generator=self.generator), y, pids


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no workers": ({"num_workers": 0}, {}),
    "workers that end": ({"num_workers": 2}, {}),
    "a collate function with a state": ({"collate_fn": Mixing(), **PERSISTENT}, {}),
    "another data set": (PERSISTENT, {"score_dataset": lambda trainer: Noisy(0.0)}),
    "the first epoch": (PERSISTENT, {"epoch": 0}),
}


@pytest.mark.parametrize("case", CASES)
def test_other_workers_are_started_and_nothing_else_changes(case: str, borrowed: list[int]) -> None:
    train, arguments = CASES[case]
    if "collate_fn" in train:
        train = {**train, "collate_fn": Mixing()}
    plain = fit([], train=train)
    if "collate_fn" in train:
        train = {**train, "collate_fn": Mixing()}
    assert same(plain, fit([scoring(**arguments)], train=train))
    assert borrowed == []


def test_a_collate_function_with_a_state_is_left_as_it_was_without_workers() -> None:
    plain = fit([], train={"collate_fn": Mixing()})
    assert same(plain, fit([scoring()], train={"collate_fn": Mixing()}))


def test_nothing_is_borrowed_in_the_middle_of_an_epoch() -> None:
    loader = DataLoader(Noisy(), BATCH, **PERSISTENT)

    class Ask(pl.Callback):
        def on_train_batch_start(self, trainer: Any, *rest: Any) -> None:
            training_set = technique.training_set
            assert training_set is not None
            assert can_borrow(training_set.loader)
            assert not training_set.has_idle_workers

        def on_train_epoch_start(self, trainer: Any, *rest: Any) -> None:
            training_set = technique.training_set
            assert training_set is not None
            found.append(training_set.has_idle_workers)

    technique, found = scoring(), []
    make_trainer(callbacks=[Ask(), technique], max_epochs=3).fit(Net(), loader)
    assert found == [False, True, True]


def test_after_an_error_in_a_pass_new_workers_are_started() -> None:
    loader = DataLoader(Noisy(0.0), BATCH, **PERSISTENT)
    expected = [batch[0] for batch in loader]
    first = loader._iterator
    with pytest.raises(IndexError):
        list(_failing(loader))
    assert loader._iterator is not first
    assert all(map(torch.equal, [batch[0] for batch in loader], expected))


def _failing(loader: DataLoader[Any]) -> Iterator[Any]:
    for number, batch in enumerate(BorrowedWorkers(loader, [[0, 1], [2, 3], [4, 5]], 0)):
        if number == 1:
            raise IndexError
        yield batch


def test_batches_come_in_their_order_and_any_size() -> None:
    loader = DataLoader(Noisy(0.0), BATCH, **PERSISTENT)
    before = [batch[0] for batch in loader]
    batches = [[5], [7, 1, 1], [0, 2, 4, 6, 8], [23]] * 5
    passes = BorrowedWorkers(loader, batches, 0)
    assert len(passes) == 20
    read = [(batch[0][:, 0] * TOTAL).round().int().tolist() for batch in passes]
    assert read == batches
    assert all(map(torch.equal, [batch[0] for batch in loader], before))
    assert get_worker_info() is None
