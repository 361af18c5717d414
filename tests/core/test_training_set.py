"""The samples of every batch, read back from the data itself, and the length of epochs, inside real fits."""

import json
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar, TQDMProgressBar
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Sampler

from lightning_grad.callbacks import RepeatedRandomSubset
from lightning_grad.core.samples.training_set import TrainingSet
from lightning_grad.core.subset import SubsetCallback
from lightning_grad.core.undo import UndoList
from lightning_grad.data import PrunableBatchSampler
from lightning_grad.testing import ResumableLoader, make_trainer

TOTAL, BATCH = 40, 4
HALF = torch.arange(0, TOTAL, 2)


class Indices(Dataset[Tensor]):
    """Every item holds its own index."""

    def __init__(self, total: int = TOTAL) -> None:
        self.total = total

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(float(index))


class AtOnce(Indices):
    """Torch asks it for all items of a batch in one call."""

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        return [torch.tensor(float(index)) for index in indices]


class Net(pl.LightningModule):
    """One weight; trains on whatever tensors there are in a batch."""

    def __init__(self, configure: Callable[[Any, Any], Any] | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.configure = configure
        self.validations: list[tuple[int, int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        parts = [part for part in torch.utils._pytree.tree_leaves(batch) if isinstance(part, Tensor)]
        return self.layer(torch.cat(parts)[:, None] / TOTAL).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def on_validation_start(self) -> None:
        if not self.trainer.sanity_checking:
            self.validations.append((self.trainer.current_epoch, self.trainer.fit_loop.batch_idx + 1))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1e-3)
        return optimizer if self.configure is None else self.configure(self, optimizer)


class Choose(SubsetCallback):
    """Keeps what a plan says for each epoch; notes what it was told of each batch, and what the batch holds."""

    def __init__(
        self,
        plan: Callable[[int], Any] = lambda epoch: HALF,
        read: Callable[[Any], Any] = lambda batch: batch,
        loader_key: str | None = None,
        fixed_steps: bool = False,
    ) -> None:
        super().__init__(loader_key)
        self.choice_of = plan
        self.read = read
        self.fixed_steps = fixed_steps
        self.told: list[tuple[int, list[int]]] = []
        self.held: list[tuple[int, list[int]]] = []
        self.lengths: list[float] = []

    @property
    def passes_more_than_once(self) -> bool:
        return self.fixed_steps

    def choose_samples(self, trainer: Any, pl_module: Any) -> Tensor | None:
        return self.choice_of(trainer.current_epoch)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        self.lengths.append(trainer.num_training_batches)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        held = self.read(batch)
        self.told.append((trainer.current_epoch, self.indices))
        self.held.append((trainer.current_epoch, [] if held is None else held.int().tolist()))

    def of_epoch(self, epoch: int) -> list[int]:
        return [index for number, indices in self.held if number == epoch for index in indices]

    def sizes(self) -> list[list[int]]:
        last = max(epoch for epoch, _ in self.held)
        return [[len(i) for number, i in self.held if number == epoch] for epoch in range(last + 1)]

    def check(self) -> None:
        assert self.told == self.held
        assert self.told


def loader(total: int = TOTAL, kind: type[DataLoader[Any]] = DataLoader, **arguments: Any) -> DataLoader[Any]:
    data = arguments.pop("dataset", Indices(total))
    if "batch_sampler" not in arguments:
        arguments = {"batch_size": BATCH, "shuffle": True, **arguments}
    return kind(data, **arguments)


def fit(choose: Any, train: Any = None, net: Any = None, validate: bool = False, **arguments: Any) -> Any:
    torch.manual_seed(0)
    callbacks = [*choose] if isinstance(choose, list) else [choose]
    trainer = make_trainer(callbacks=callbacks, **{"max_epochs": 3, **arguments})
    net = Net() if net is None else net
    trainer.fit(
        net,
        loader() if train is None else train,
        loader(4, shuffle=False) if validate else None,
        ckpt_path=arguments.pop("ckpt_path", None),
    )
    return trainer, net


# What draw tells is what the batch holds.

LOADERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "in order": {"shuffle": False},
    "workers": {"num_workers": 2},
    "workers, prefetch 4": {"num_workers": 2, "prefetch_factor": 4},
    "persistent workers": {"num_workers": 2, "persistent_workers": True},
    "collate": {"collate_fn": lambda items: torch.stack(items[::1])},
    "getitems": {"dataset": AtOnce()},
    "drop_last": {"drop_last": True, "dataset": Indices(39)},
    "generator": {"generator": torch.Generator().manual_seed(3)},
    "batch sampler": {"batch_sampler": BatchSampler(range(TOTAL), 3, False)},
}


@pytest.mark.parametrize("name", LOADERS)
def test_the_samples_of_a_batch_are_those_it_holds(name: str) -> None:
    plan = {0: None, 1: HALF, 2: torch.arange(5, 30)}
    choose = Choose(plan.get)
    fit(choose, loader(**LOADERS[name]))
    choose.check()
    for epoch in (1, 2):
        held, batch = choose.of_epoch(epoch), len(choose.held[0][1])
        assert set(held) <= set(plan[epoch].tolist())
        assert len(held) == len(set(held)) >= len(plan[epoch]) // batch * batch
        if name not in ("in order", "batch sampler"):
            assert held != sorted(held)


@pytest.mark.parametrize("workers", [0, 1])
def test_pruning_acts_from_the_first_batch_of_the_first_epoch(workers: int) -> None:
    choose = Choose()
    fit(choose, loader(num_workers=workers), max_epochs=2)
    choose.check()
    assert [sorted(choose.of_epoch(epoch)) for epoch in (0, 1)] == [HALF.tolist()] * 2


def test_epochs_shrink_and_grow_again() -> None:
    plan = {0: HALF, 1: None, 2: torch.arange(30), 3: torch.arange(3), 4: torch.cat([HALF, torch.arange(TOTAL)])}
    choose = Choose(plan.get)
    trainer, _ = fit(choose, max_epochs=5)
    choose.check()
    assert choose.lengths == [5, 10, 8, 1, 15]
    for epoch, kept in plan.items():
        assert sorted(choose.of_epoch(epoch)) == sorted(range(TOTAL) if kept is None else kept.tolist())
    assert trainer.global_step == 39


@pytest.mark.parametrize("drop_last", [False, True])
def test_fixed_steps_pass_through_the_kept_samples_more_than_once(drop_last: bool) -> None:
    kept = torch.arange(9)
    choose = Choose(lambda epoch: kept, fixed_steps=True)
    fit(choose, loader(39, drop_last=drop_last), max_epochs=2)
    choose.check()
    assert choose.lengths == [9, 9] if drop_last else [10, 10]
    held = choose.of_epoch(1)
    assert sorted(held[:9]) == sorted(held[9:18]) == kept.tolist()
    assert held[:9] != held[9:18]


def test_accumulation_and_limits() -> None:
    for limit, batches in ((3, 3), (0.5, 2), (1.0, 5), (8, 5)):
        choose = Choose(lambda epoch: None if epoch == 0 else HALF)
        fit(choose, loader(num_workers=1 if limit == 3 else 0), limit_train_batches=limit, accumulate_grad_batches=3)
        choose.check()
        assert choose.lengths[1:] == [batches, batches]
        assert choose.sizes()[1:] == [[BATCH] * batches] * 2


@pytest.mark.parametrize("workers", [0, 1])
def test_loaders_that_are_made_anew_every_epoch(workers: int) -> None:
    class Fresh(Net):
        def train_dataloader(self) -> Any:
            return loader(num_workers=workers)

    choose = Choose(lambda epoch: None if epoch == 1 else HALF + 1)
    trainer = make_trainer(callbacks=[choose], max_epochs=4, reload_dataloaders_every_n_epochs=1)
    trainer.fit(Fresh())
    choose.check()
    assert choose.lengths == [5, 10, 5, 5]
    assert sorted(choose.of_epoch(3)) == (HALF + 1).tolist()


def test_a_loader_that_is_handed_out_again_every_epoch() -> None:
    train, choose = loader(num_workers=1, persistent_workers=True), Choose(lambda epoch: None if epoch == 1 else HALF)
    original = train.batch_sampler
    fit(choose, train, reload_dataloaders_every_n_epochs=1)
    choose.check()
    assert choose.lengths == [5, 10, 5]
    assert train.batch_sampler is original


class Peek(pl.Callback):
    """Goes through training data itself, as a re-estimation of BatchNorm would."""

    def __init__(self, at: str, batches: int = 2) -> None:
        self.at = at
        self.batches = batches

    def _peek(self, trainer: Any) -> None:
        for _ in zip(range(self.batches), trainer.train_dataloader, strict=False):
            pass

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if self.at == "epoch":
            self._peek(trainer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.at == "batch" and batch_idx == 3:  # within both epochs, however many batches they have
            self._peek(trainer)


class Generating(DataLoader[Any]):
    """A loader whose iterator is a generator around that of torch."""

    def __iter__(self) -> Any:
        yield from super().__iter__()


@pytest.mark.parametrize("kind", [DataLoader, Generating])
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("at", ["epoch", "batch"])
def test_others_may_go_through_the_loader_in_mid_epoch(at: str, workers: int, kind: Any) -> None:
    choose = Choose(lambda epoch: None if epoch == 0 else HALF)
    train = loader(kind=kind, num_workers=workers)
    fit([choose, Peek(at), Peek(at, 100)], train, max_epochs=2)
    choose.check()
    assert choose.sizes() == [[4] * 10, [4] * 5]


def skip_threes(items: list[Tensor]) -> Tensor | None:
    kept = [item for item in items if int(item) % 3]
    return torch.stack(kept) if len(kept) == len(items) else None


def test_batches_that_collate_to_nothing_leave_the_others_right() -> None:
    # Lightning calls no hook for a batch that is None.
    choose = Choose(lambda epoch: None if epoch == 0 else HALF)
    train = loader(batch_size=2, collate_fn=skip_threes)
    with pytest.warns(UserWarning, match="train_dataloader yielded None"):
        fit(choose, train)
    choose.check()
    assert all(index % 3 for _, indices in choose.told for index in indices)
    assert {epoch for epoch, _ in choose.told} == {0, 1, 2}


class Slipping(Net):
    """Leaves the second epoch after two batches."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if self.trainer.current_epoch == 1 and batch_idx == 2 else None


def test_an_epoch_that_is_left_early() -> None:
    choose = Choose()
    fit(choose, loader(num_workers=1), Slipping())
    choose.check()
    assert [len(sizes) for sizes in choose.sizes()] == [5, 3, 5]


# Several loaders.


def pick(key: Any) -> Callable[[Any], Any]:
    return lambda batch: batch[key]


CONTAINERS: dict[str, tuple[Callable[[Any, Any], Any], str, Any]] = {
    "dict": (lambda a, b: {"a": a, "b": b}, "a", pick("a")),
    "list": (lambda a, b: [b, a], "1", pick(1)),
    "tuple": (lambda a, b: (a, b), "0", pick(0)),
    "nested": (lambda a, b: {"x": [b, a], "y": b}, "x.1", lambda batch: batch["x"][1]),
    "combined": (lambda a, b: CombinedLoader({"a": a, "b": b}, "max_size_cycle"), "a", pick("a")),
    "min_size": (lambda a, b: CombinedLoader({"b": b, "a": a}, "min_size"), "a", pick("a")),
    "max_size": (lambda a, b: CombinedLoader([a, b], "max_size"), "0", pick(0)),
}


@pytest.mark.parametrize(("name", "workers"), [*((name, 0) for name in CONTAINERS), ("dict", 1), ("max_size", 1)])
def test_one_of_several_loaders(name: str, workers: int) -> None:
    contain, key, read = CONTAINERS[name]
    choose = Choose(lambda epoch: None if epoch == 0 else HALF, read, key)
    other = loader(7 * BATCH)
    sampler = other.batch_sampler
    fit(choose, contain(loader(num_workers=workers), other))
    choose.check()
    assert other.batch_sampler is sampler
    # The other has 7 batches: with the pruned one's 5, an epoch of max_size_cycle begins it a second time.
    assert choose.lengths == ([7, 5, 5] if name == "min_size" else [10, 7, 7])
    assert sorted(choose.of_epoch(2)[:20]) == HALF.tolist()
    beyond = set(choose.of_epoch(2)[20:])
    assert beyond <= set(HALF.tolist())
    assert bool(beyond) == (name not in ("min_size", "max_size"))


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.arange(32.0))


@pytest.mark.parametrize("mode", ["max_size_cycle", "max_size", "min_size"])
def test_beside_a_stream_of_unknown_length(mode: Any) -> None:
    """Lightning then fetches a batch ahead, so that the next pass has begun when a pass's last batch is trained on."""
    choose = Choose(lambda epoch: torch.arange(9), pick("a"), "a")
    both = CombinedLoader({"a": loader(), "b": DataLoader(Stream(), BATCH)}, mode)
    fit(choose, both, max_epochs=2)
    choose.check()
    assert sorted(choose.of_epoch(1)[:9]) == list(range(9))


def test_samples_of_a_whole_epoch_count_every_pass() -> None:
    class Whole(Choose):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            super().on_train_start(trainer, pl_module)
            self.whole = (self.training_set.full_batches, self.training_set.full_samples)

    for mode, expected in (("max_size_cycle", (10, 40)), ("max_size", (10, 22)), ("min_size", (6, 22))):
        choose = Whole(lambda epoch: None, pick("a"), "a")
        fit(choose, CombinedLoader({"a": loader(22), "b": loader(40)}, mode), max_epochs=1)  # type: ignore[arg-type]
        assert choose.whole == (expected[0], 22 + 16 if mode == "max_size_cycle" else expected[1])
        assert choose._samples_seen == choose.whole[1]
    for limit, expected in ((3, (3, 12)), (0.5, (5, 20)), (1.0, (10, 39))):
        alone = Whole(lambda epoch: None)
        fit(alone, loader(39), max_epochs=1, limit_train_batches=limit)
        assert alone.whole == expected


def test_a_key_is_needed_and_must_be_known() -> None:
    both = {"a": loader(), "b": loader()}
    with pytest.raises(ValueError, match=r"Choose must know which .* Set loader_key to one of 'a', 'b'\."):
        fit(Choose(), both)
    with pytest.raises(ValueError, match=r"loader_key must be one of 'a', 'b' for the training loaders; got 'c'"):
        fit(Choose(loader_key="c"), both)
    with pytest.raises(ValueError, match="loader_key='c' matches nothing: the only training loader has no key"):
        fit(Choose(loader_key="c"), loader())


# Going on from a checkpoint.


class Interrupt(pl.Callback):
    def __init__(self, epoch: int, batch_idx: int, error: type[BaseException] = RuntimeError) -> None:
        self.where = (epoch, batch_idx)
        self.error = error

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == self.where:
            raise self.error("stopped on purpose")


def changing(epoch: int) -> Tensor | None:
    return None if epoch == 0 else torch.arange(TOTAL - 8 * epoch)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("workers", [0, 2])
def test_resume_with_a_loader_that_continues_in_mid_epoch(workers: int, tmp_path: Any) -> None:
    def train() -> Any:
        return loader(kind=ResumableLoader, shuffle=False, num_workers=workers)

    whole = Choose(changing)
    saving = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=3 if not workers else 7)
    fit([whole, saving], train(), enable_checkpointing=True)
    for path in tmp_path.glob("*.ckpt"):
        steps = torch.load(path, weights_only=True)["global_step"]
        rest = Choose(changing)
        trainer = make_trainer(callbacks=[rest], max_epochs=3)
        trainer.fit(Net(), train(), ckpt_path=path)
        if steps < len(whole.held):
            rest.check()
        assert rest.held == whole.held[steps:], path.name


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("every", [10, 3])
def test_resume_with_a_plain_loader(every: int, workers: int, tmp_path: Any) -> None:
    """At an epoch's end it is exact; in mid-epoch the loader begins anew (Lightning's limit), yet what is told is true."""
    whole = Choose(changing)
    saving = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=every)
    fit([whole, saving], loader(shuffle=False), enable_checkpointing=True)
    for path in sorted(tmp_path.glob("*.ckpt"))[:2]:
        steps = torch.load(path, weights_only=True)["global_step"]
        rest = Choose(changing)
        trainer = make_trainer(callbacks=[rest], max_epochs=3)
        trainer.fit(Net(), loader(shuffle=False, num_workers=workers), ckpt_path=path)
        rest.check()
        assert len(rest.held) == len(whole.held) - steps
        assert [epoch for epoch, _ in rest.held] == [epoch for epoch, _ in whole.held[steps:]]
        if steps == 10:
            assert rest.held == whole.held[10:]


# The length of epochs, as the trainer and its bars see it.


class Bar(ProgressBar):
    def __init__(self) -> None:
        super().__init__()
        self.totals: list[float] = []

    def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
        self.totals.append(self.total_train_batches)


class TQDM(TQDMProgressBar):
    def __init__(self) -> None:
        super().__init__()
        self.totals: list[Any] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.totals.append((self.train_progress_bar.n, self.train_progress_bar.total))
        super().on_train_epoch_end(trainer, pl_module)


def test_bars_show_the_length_of_each_epoch() -> None:
    plan = {0: None, 1: HALF, 2: torch.arange(30)}
    bar, choose = Bar(), Choose(plan.get)
    fit([choose, bar], enable_progress_bar=True)
    assert bar.totals == choose.lengths == [10, 5, 8]


def test_tqdm_counts_to_the_length_of_each_epoch(capsys: Any) -> None:
    plan = {0: None, 1: HALF, 2: torch.arange(30)}
    bar = TQDM()
    fit([Choose(plan.get), bar], enable_progress_bar=True)
    capsys.readouterr()
    assert bar.totals == [(10, 10), (5, 5), (8, 8)]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_steps_are_those_of_the_pruned_epochs(accumulate: int) -> None:
    trainer, _ = fit(Choose(lambda epoch: HALF if epoch else None), accumulate_grad_batches=accumulate)
    assert trainer.global_step == (20 if accumulate == 1 else 4 + 2 + 2)
    assert trainer.current_epoch == 3


def test_max_steps_ends_in_mid_epoch() -> None:
    choose = Choose(lambda epoch: HALF if epoch else None)
    trainer, _ = fit(choose, max_epochs=-1, max_steps=17)
    assert trainer.global_step == 17
    assert [len(sizes) for sizes in choose.sizes()] == [10, 5, 2]


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        (1.0, [(0, 10), (1, 5), (2, 8)]),
        (0.5, [(0, 5), (0, 10), (1, 2), (1, 4), (2, 4), (2, 8)]),
        (0.1, [(e, b) for e, last in ((0, 10), (1, 5), (2, 8)) for b in range(1, last + 1)]),
        (4, [(0, 4), (0, 8), (1, 4), (2, 4), (2, 8)]),
        (5, [(0, 5), (0, 10), (1, 5), (2, 5)]),
    ],
)
def test_validation_follows_the_interval_in_each_epoch(interval: Any, expected: Any) -> None:
    plan = {0: None, 1: HALF, 2: torch.arange(30)}
    _, net = fit(Choose(plan.get), validate=True, val_check_interval=interval, num_sanity_val_steps=0)
    assert net.validations == expected


@pytest.mark.parametrize("reload", [0, 1])
def test_an_interval_that_a_pruned_epoch_does_not_reach_validates_at_its_end(reload: int) -> None:
    plan = {0: None, 1: HALF, 2: HALF + 1, 3: torch.arange(30), 4: None}
    with pytest.warns(UserWarning, match="val_check_interval=9 exceeds the [58] batches of a pruned epoch") as caught:
        _, net = fit(
            Choose(plan.get),
            validate=True,
            val_check_interval=9,
            max_epochs=5,
            num_sanity_val_steps=0,
            reload_dataloaders_every_n_epochs=reload,
        )
    assert net.validations == [(0, 9), (1, 5), (2, 5), (3, 8), (4, 9)]
    warnings = [str(warning.message) for warning in caught if "val_check_interval" in str(warning.message)]
    assert len(warnings) == 1


def test_without_validation_no_word_about_its_interval() -> None:
    fit(Choose(), val_check_interval=9, limit_val_batches=0)
    fit(Choose(), val_check_interval=9, num_sanity_val_steps=0)


def test_an_interval_over_all_epochs_counts_batches_of_any() -> None:
    _, net = fit(
        Choose(lambda epoch: HALF if epoch else None),
        validate=True,
        val_check_interval=7,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
    )
    assert net.validations == [(0, 7), (1, 4)]


def test_every_second_epoch() -> None:
    _, net = fit(Choose(), validate=True, check_val_every_n_epoch=2, max_epochs=4, num_sanity_val_steps=0)
    assert net.validations == [(1, 5), (3, 5)]


def test_schedules_are_made_for_the_whole_run() -> None:
    estimates: list[float] = []

    def configure(net: Any, optimizer: Any) -> Any:
        estimates.append(net.trainer.estimated_stepping_batches)
        return optimizer

    choose = Choose()
    trainer, _ = fit(choose, net=Net(configure), accumulate_grad_batches=2)
    assert estimates == [15]
    choose.check()
    assert choose.lengths == [5, 5, 5]
    assert trainer.global_step == 9


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_schedules_are_made_for_the_whole_run_also_on_resume(tmp_path: Any) -> None:
    estimates: list[float] = []

    def configure(net: Any, optimizer: Any) -> Any:
        estimates.append(net.trainer.estimated_stepping_batches)
        return optimizer

    saving = ModelCheckpoint(tmp_path, save_top_k=-1)
    fit([Choose(changing), saving], loader(shuffle=False), Net(configure), enable_checkpointing=True)
    path = next(path for path in tmp_path.glob("*.ckpt") if "epoch=1" in path.name)
    rest = Choose(changing)
    make_trainer(callbacks=[rest], max_epochs=3).fit(Net(configure), loader(shuffle=False), ckpt_path=path)
    assert estimates == [30, 30]
    rest.check()
    assert rest.lengths == [6]


def test_what_fills_no_batch_is_an_error() -> None:
    train = loader(drop_last=True)
    with pytest.raises(
        ValueError, match="Choose keeps 3 samples, which do not fill one batch of 4, and drop_last=True"
    ):
        fit(Choose(lambda epoch: torch.arange(3) if epoch else None), train)
    with pytest.raises(ValueError, match="RepeatedRandomSubset keeps 1 samples"):
        fit(RepeatedRandomSubset(0.99), train)
    choose = Choose(lambda epoch: torch.arange(4))
    fit(choose, train)
    assert choose.lengths == [1, 1, 1]


# Everything is given back.


def _run(choose: Any, train: Any, error: type[BaseException] | None, net: Any = None) -> None:
    callbacks = [choose] if error is None else [choose, Interrupt(1, 2, error)]
    trainer = make_trainer(callbacks=callbacks, max_epochs=3)
    if error is None:
        trainer.fit(Net() if net is None else net, train)
    else:
        with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
            trainer.fit(Net() if net is None else net, train)
    for owner in (trainer.fit_loop, trainer.fit_loop._data_source, trainer.strategy):
        assert not {"setup_data", "dataloader", "process_dataloader"} & owner.__dict__.keys()
        assert not [key for key in owner.__dict__ if "lightning_grad" in key]


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("persistent", [False, True])
def test_the_loader_is_as_before(error: Any, persistent: bool) -> None:
    train = loader(**({"num_workers": 1, "persistent_workers": True} if persistent else {}))
    original = train.batch_sampler
    choose = Choose()
    _run(choose, train, error)
    assert train.batch_sampler is original
    assert not hasattr(choose, "training_set")
    assert sorted(torch.cat(list(train)).tolist()) == list(range(TOTAL))
    again = Choose()
    _run(again, train, None)  # a second fit of the same loader
    again.check()
    assert again.lengths == [5, 5, 5]
    plain = make_trainer(max_epochs=1)
    plain.fit(Net(), train)  # and one without the callback
    assert plain.global_step == 10


@pytest.mark.parametrize("error", [None, RuntimeError])
def test_the_same_callback_and_trainer_fit_again(error: Any) -> None:
    choose, net = Choose(), Net()
    trainer = make_trainer(callbacks=[choose], max_epochs=1)
    trainer.fit(net, loader())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(net, loader(80))
    choose.check()
    assert choose.lengths[:1] == [5]


def test_an_error_while_the_data_is_loaded_gives_everything_back() -> None:
    constructor = DataLoader.__init__
    train = {"a": loader(), "b": loader()}
    originals = [one.batch_sampler for one in train.values()]
    trainer = make_trainer(callbacks=[Choose(loader_key="c")])
    with pytest.raises(ValueError, match="for the training loaders; got 'c'"):
        trainer.fit(Net(), train)
    assert [one.batch_sampler for one in train.values()] == originals
    assert "setup_data" not in trainer.fit_loop.__dict__
    assert DataLoader.__init__ is constructor, "Lightning patches it while it asks for the loaders"


def test_loaders_of_past_epochs_are_let_go() -> None:
    """A data set that is made anew every epoch would else be held in memory until the end."""

    class Fresh(Net):
        def train_dataloader(self) -> Any:
            return loader()

    class Steps(Choose):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            super().on_train_epoch_end(trainer, pl_module)
            self.most = len(self.undo)

    choose, once = Steps(), Steps()
    make_trainer(callbacks=[once], max_epochs=1).fit(Fresh())
    make_trainer(callbacks=[choose], max_epochs=4, reload_dataloaders_every_n_epochs=1).fit(Fresh())
    assert choose.most == once.most


# What cannot work is refused.


class ByHand:
    """Batches, and no DataLoader."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.arange(8.0).chunk(2))

    def __len__(self) -> int:
        return 2


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (ByHand(), r"Choose needs a torch DataLoader .* got ByHand\."),
        ([torch.arange(4.0)], r"Choose needs a torch DataLoader .* got Tensor\."),
        (DataLoader(Stream(), BATCH), "the samples of the IterableDataset Stream have none"),
        (
            DataLoader(Indices(), batch_size=None),
            r"Choose needs batches of indices, but .*\(batch_size=None\) is SequentialSampler, which has no batch_size",
        ),
        (
            DataLoader(Indices(), BATCH, num_workers=1, in_order=False),
            r"DataLoader\(in_order=False\) does not keep their order\. Set in_order=True",
        ),
    ],
    ids=["no loader", "list of tensors", "iterable", "batch_size=None", "in_order=False"],
)
def test_data_without_indices_is_refused(train: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        fit(Choose(), train)


def test_two_that_choose_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="RepeatedRandomSubset and Choose would both choose the training samples"):
        fit([RepeatedRandomSubset(), Choose()])


class Unknown(Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(TOTAL))

    def __len__(self) -> int:
        return TOTAL


def _stand_in(ranks: int, process: Callable[[Any], Any] = lambda given: given) -> Any:
    """As much of a trainer as the loading needs."""
    source = SimpleNamespace(dataloader=lambda: None)
    loop = SimpleNamespace(_data_source=source, setup_data=lambda: None)
    return SimpleNamespace(world_size=ranks, fit_loop=loop, strategy=SimpleNamespace(process_dataloader=process))


@pytest.mark.parametrize(
    "train",
    [
        loader(sampler=Unknown(), shuffle=None),
        loader(batch_sampler=type("Own", (BatchSampler,), {})(range(TOTAL), BATCH, False)),
    ],
    ids=["sampler", "batch sampler"],
)
def test_samplers_of_ones_own_are_refused_under_several_ranks(train: Any) -> None:
    original = train.batch_sampler
    TrainingSet(_stand_in(1), "Choose", UndoList())._install(train)
    train.__dict__["batch_sampler"] = original
    with pytest.raises(
        TypeError, match=r"Choose does not know which samples each of the 2 ranks draws from (Own|BatchSampler)"
    ):
        TrainingSet(_stand_in(2), "Choose", UndoList())._install(train)
    assert train.batch_sampler is original


def test_a_strategy_that_wraps_the_loader_is_refused() -> None:
    class Wrapped(list[Any]):
        pass

    undo, train = UndoList(), loader()
    original = train.batch_sampler
    trainer = _stand_in(1, lambda given: Wrapped([given]))
    trainer.fit_loop._data_source.dataloader = lambda: train
    TrainingSet(trainer, "Choose", undo)
    trainer.fit_loop._data_source.dataloader()
    with pytest.raises(
        TypeError, match=r"Choose must see the training loader's own batches, but .* wraps the loader in Wrapped"
    ):
        trainer.strategy.process_dataloader(train)
    undo.run()
    assert train.batch_sampler is original


class Bypassing(DataLoader[Any]):
    def __iter__(self) -> Any:
        return iter(torch.arange(8.0).chunk(2))


def test_a_loader_that_makes_batches_without_its_sampler_is_found_out() -> None:
    with pytest.raises(
        RuntimeError, match="does not know which samples are in batch 0, because Bypassing created it without"
    ):
        fit(Choose(), loader(kind=Bypassing))


# Two ranks.


class Write(pl.Callback):
    """Every rank writes what its batches held."""

    def __init__(self, choose: Choose, folder: Any) -> None:
        self.choose = choose
        self.folder = folder

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.choose.check()
        wrapped = isinstance(trainer.train_dataloader.batch_sampler, PrunableBatchSampler)
        found = {"held": self.choose.held, "lengths": self.choose.lengths, "wrapped": wrapped}
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(found))


def _two_ranks(choose: Choose, folder: Any, train: Any = None, **arguments: Any) -> list[Any]:
    fit([choose, Write(choose, folder)], train, strategy="ddp_fork", devices=2, **arguments)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def _of(rank: Any, epoch: int) -> list[int]:
    return [index for number, indices in rank["held"] if number == epoch for index in indices]


def test_two_ranks_share_the_kept_samples(tmp_path: Any) -> None:
    plan = {0: None, 1: torch.arange(19), 2: HALF, 3: torch.arange(19)}
    first, second = _two_ranks(Choose(plan.get), tmp_path, loader(num_workers=1), max_epochs=4)
    assert first["lengths"] == second["lengths"] == [5, 3, 3, 3]
    assert first["wrapped"]
    assert second["wrapped"]
    for epoch, kept in plan.items():
        one, other = _of(first, epoch), _of(second, epoch)
        assert len(one) == len(other)
        assert set(one) | set(other) == set(range(TOTAL) if kept is None else kept.tolist())
        assert len(one) + len(other) - len({*one, *other}) == (1 if epoch in (1, 3) else 0), "padding alone is shared"
    assert _of(first, 1) != _of(first, 3), "reshuffled"


def test_two_ranks_reload_and_pass_more_than_once(tmp_path: Any) -> None:
    kept = torch.arange(7)
    choose = Choose(lambda epoch: kept if epoch else None, fixed_steps=True)
    first, second = _two_ranks(choose, tmp_path, reload_dataloaders_every_n_epochs=1)
    assert first["lengths"] == second["lengths"] == [5, 5, 5]
    for epoch in (1, 2):
        one, other = _of(first, epoch), _of(second, epoch)
        assert len(one) == len(other) == 20
        assert set(one[:4] + other[:4]) == set(one[4:8] + other[4:8]) == set(kept.tolist())
        assert one[:4] != one[4:8]
