"""Rarer modules, data sets, trainers and settings: what works with them is what works without, the others are told so."""

import csv
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, Subset, TensorDataset

from lightning_grad.callbacks import DataPruning, InfoBatch, LossReweighting, UniformLearning
from lightning_grad.core.samples.schedule_warp import count_steps
from lightning_grad.testing import assert_identical, make_trainer, state_of
from tests.callbacks.data_pruning.test_data_pruning import BATCH, SAMPLES, Classifier, make_data, train
from tests.callbacks.data_pruning.test_loss_reweighting import weights_by_hand
from tests.callbacks.data_pruning.test_schedules import half_from_two, run, scheduled


def pruning(*args: Any, **arguments: Any) -> DataPruning:
    """Build one that leaves no files."""
    return DataPruning(*args, **{"num_shown": 0, "figure": False, **arguments})


def state_after(callback: Any, *args: Any, **arguments: Any) -> Any:
    found = train(callback, *args, **arguments)
    return state_of(found.trainer, found.module)


# Modules whose step needs what their own hooks set.


class Scaled(Classifier):
    """Scales its loss by a factor that it has only once a hook has set it."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * self.factor


class FromTrainStart(Scaled):
    def on_train_start(self) -> None:
        self.factor = 0.7


class FromEpochStart(Scaled):
    def on_train_epoch_start(self) -> None:
        self.factor = 1.0 / (1 + self.current_epoch)


class FromBatchStart(Scaled):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.factor = 1.0 / (1 + batch_idx)


HOOKED = [FromTrainStart, FromEpochStart, FromBatchStart]


@pytest.mark.parametrize("kind", HOOKED)
def test_a_step_that_needs_what_a_hook_sets_is_scored(kind: Any) -> None:
    callback = pruning(0.0, epoch=1)
    assert_identical(state_after(callback, kind(), epochs=3), state_after(pl.Callback(), kind(), epochs=3))
    assert callback.scored.values.isfinite().all()


@pytest.mark.parametrize("kind", HOOKED)
def test_a_step_that_needs_what_a_hook_sets_is_clustered(kind: Any) -> None:
    found = train(UniformLearning(epoch=1), kind(), epochs=3)
    assert len(found.watch.epochs[0]) == SAMPLES < len(found.watch.epochs[1])


# Losses that are watched while a tuner trains a few steps before the fit.


class Tunable(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.learning_rate = 0.2


WATCHING: list[Callable[[], Any]] = [lambda: InfoBatch(0.5, prune_until=1.0), lambda: pruning(0.5, "aum", epoch=1)]


@pytest.mark.parametrize("make", WATCHING, ids=["info", "aum"])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_search_for_the_learning_rate(make: Any, is_first: bool, tmp_path: Path) -> None:
    callback, finder = make(), LearningRateFinder(min_lr=1e-3, max_lr=0.1, num_training_steps=5, update_attr=False)
    first, last = (callback, finder) if is_first else (finder, callback)
    tuned = train(first, Tunable(), epochs=3, more=[last], default_root_dir=tmp_path)
    assert len(finder.optimal_lr.results["lr"]) >= 5
    assert len(tuned.watch.epochs) == 3
    assert sorted(tuned.watch.epochs[0]) == list(range(SAMPLES))
    assert all(len(epoch) < SAMPLES for epoch in tuned.watch.epochs[1:])
    assert sorted(tuned.watch.epochs[2]) == callback.kept.tolist()
    assert callback._samples_seen == sum(map(len, tuned.watch.epochs))


# Samples that do not count in the loss, and ranks that have fewer.


class Effective(pl.Callback):
    def __init__(self, callback: LossReweighting) -> None:
        self.callback = callback
        self.found: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.found.append(float(self.callback._effective))


class ClassWeighted(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1], weight=torch.tensor([1.0, 5.0, 0.0]))


class EqualWithoutZero(ClassWeighted):
    """Has a class without weight, and the same for the others."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1], weight=torch.tensor([2.0, 2.0, 0.0]))


@pytest.mark.parametrize(
    ("module", "ignored"), [(Classifier, [0, 3, 10, 11, 12]), (ClassWeighted, []), (EqualWithoutZero, [1, 2])]
)
def test_a_high_temperature_leaves_a_loss_with_ignored_samples_as_it_is(module: Any, ignored: list[int]) -> None:
    x, y, index = make_data().tensors
    data = TensorDataset(x, y.index_fill(0, torch.tensor(ignored, dtype=torch.long), -100), index)
    callback = LossReweighting(temperature=1e9, start_temperature=1e9, warmup_fraction=0.0)
    effective = Effective(callback)
    found = train(callback, module(), data, more=[effective]).module.state_dict()
    plain = train(pl.Callback(), module(), data).module.state_dict()
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6)
    assert effective.found == pytest.approx([1.0] * len(effective.found), abs=1e-4)
    assert len(effective.found) == 6


class Uneven(IterableDataset[Any]):
    """Gives one rank 24 samples, and the other 21."""

    def __iter__(self) -> Any:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        return iter(make_data(24 - 3 * rank))


class WriteLosses(Effective):
    """Every rank writes the losses of its batches, and how many samples are effective."""

    def __init__(self, callback: LossReweighting, folder: Path) -> None:
        super().__init__(callback)
        self.folder = folder
        self.losses: list[list[float]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end()
        logits = pl_module.seen[-1][1]
        self.losses.append(F.cross_entropy(logits, batch[1], reduction="none").tolist())

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        found = {"losses": self.losses, "effective": self.found}
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(found))


def test_two_ranks_with_batches_of_different_size(tmp_path: Path) -> None:
    callback = LossReweighting(temperature=0.5, start_temperature=0.5, warmup_fraction=0.0)
    loader = DataLoader(Uneven(), BATCH)
    arguments: Any = {"strategy": "ddp_fork", "devices": 2, "max_steps": 6}
    train(callback, Classifier(normalizes=False), loader=loader, more=[WriteLosses(callback, tmp_path)], **arguments)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert [len(losses) for losses in first["losses"]] == [8, 8, 8] * 2
    assert [len(losses) for losses in second["losses"]] == [8, 8, 5] * 2
    assert first["effective"] == second["effective"]
    for own, other, effective in zip(first["losses"], second["losses"], first["effective"], strict=True):
        weights = weights_by_hand(torch.tensor(own + other), "linupper", 0.5)
        assert effective == pytest.approx(1.0 / (weights.square().sum().item() * len(weights)), rel=1e-4)


# Random streams that a data set or a module has of its own.


class Noise:
    """Adds noise from a stream of its own; a transform, as people write them."""

    def __init__(self, kind: str) -> None:
        self.rng: Any = {
            "numpy": lambda: np.random.default_rng(0),
            "torch": lambda: torch.Generator().manual_seed(0),
            "python": lambda: random.Random(0),
        }[kind]()

    def __call__(self, x: Tensor) -> Tensor:
        if isinstance(self.rng, torch.Generator):
            return x + torch.randn((), generator=self.rng)
        return x + (self.rng.random() - 0.5)


class Noisy(Dataset[Any]):
    """Owns the stream itself."""

    def __init__(self, kind: str) -> None:
        self.data, self.rng = make_data(), Noise(kind).rng

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        x, y, number = self.data[index]
        return self.noise(x), y, number

    def noise(self, x: Tensor) -> Tensor:
        noise = Noise.__new__(Noise)
        noise.rng = self.rng
        return noise(x)


class Transformed(Noisy):
    """Has a transform that owns the stream."""

    def __init__(self, kind: str) -> None:
        self.data, self.transform = make_data(), Noise(kind)

    def noise(self, x: Tensor) -> Tensor:
        return self.transform(x)


DATASETS: dict[str, Callable[[str], Any]] = {
    "its own": Noisy,
    "in a subset": lambda kind: Subset(Noisy(kind), range(SAMPLES)),
    "in a transform": Transformed,
}


@pytest.mark.filterwarnings("ignore:.*scores samples that differ each time they are read")
@pytest.mark.parametrize("place", DATASETS)
@pytest.mark.parametrize("kind", ["numpy", "torch", "python"])
def test_scoring_does_not_move_the_streams_of_a_data_set(kind: str, place: str) -> None:
    make = DATASETS[place]
    assert not torch.equal(make(kind)[0][0], make_data()[0][0])
    scored = state_after(DataPruning(0.0, epoch=1, num_shown=2, figure=False), dataset=make(kind), epochs=3)
    assert_identical(scored, state_after(pl.Callback(), dataset=make(kind), epochs=3))


class Remembering(Classifier):
    """Weighs its loss by the one before, which it keeps in an object in an object."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = SimpleNamespace(last=SimpleNamespace(loss=0.0))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        factor = 1 + self.memory.last.loss
        self.memory.last.loss = loss.item()
        return loss * factor


def test_scoring_gives_back_what_an_object_of_the_module_holds() -> None:
    scored, plain = (train(callback, Remembering(), epochs=3) for callback in (pruning(0.0, epoch=1), pl.Callback()))
    assert_identical(state_of(scored.trainer, scored.module), state_of(plain.trainer, plain.module))
    assert scored.module.memory == plain.module.memory


# Ends of a run, and schedules.


@pytest.mark.parametrize("max_steps", [32, 35, 39])
def test_a_run_that_ends_by_epochs_and_not_by_its_steps_is_warned_of_once(max_steps: int, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Set only one of max_epochs and max_steps") as caught:
        run(half_from_two(), scheduled("cosine"), tmp_path, max_steps=max_steps)
    assert sum("Set only one of max_epochs and max_steps" in str(warning.message) for warning in caught) == 1


@pytest.mark.parametrize("max_steps", [-1, 25, 30, 40, 41, 1000])
def test_other_ends_are_not_warned_of(max_steps: int, tmp_path: Path) -> None:
    run(half_from_two(), scheduled("cosine"), tmp_path, max_steps=max_steps)  # a warning would raise


@pytest.mark.parametrize("frequency", [1, 2, 3, 4])
@pytest.mark.parametrize("accumulate", [1, 2, 3, 4, 5])
def test_steps_of_a_schedule_are_those_counted_one_by_one(accumulate: int, frequency: int) -> None:
    for batches in range(31):
        counted = 0
        for batch in range(batches + 1):
            optimizer_steps = batch % accumulate == 0 or batch == batches
            counted += batch > 0 and optimizer_steps and batch % frequency == 0
            assert count_steps(batches, batch, accumulate, frequency) == counted, (batches, batch)


def share_in_summary(folder: Path, samples: int, **arguments: Any) -> tuple[float, float]:
    found = train(pruning(0.0, epoch=1), dataset=make_data(samples), logger=CSVLogger(folder), **arguments)
    with Path(found.trainer.logger.log_dir, "metrics.csv").open() as file:
        (row,) = [row for row in csv.DictReader(file) if row["data/samples_share"]]
    assert float(row["data/samples_seen"]) == sum(map(len, found.watch.epochs))
    return float(row["data/samples_share"]), found.trainer.global_step


@pytest.mark.parametrize(
    ("samples", "max_steps"),
    [
        *((24, max_steps) for max_steps in (4, 5, 6, 7, -1)),
        *((22, max_steps) for max_steps in (4, 5, 6, 7, -1)),
    ],
)
def test_nothing_is_saved_where_nothing_is_pruned(samples: int, max_steps: int, tmp_path: Path) -> None:
    share, steps = share_in_summary(tmp_path, samples, epochs=3, max_steps=max_steps)
    assert steps == (max_steps if max_steps > 0 else 9)
    assert share == pytest.approx(1.0)


# Data sets and loaders.


class Part(Sampler[int]):
    """Draws every other sample, which nothing tells."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(0, SAMPLES, 2))

    def __len__(self) -> int:
        return SAMPLES // 2


class Whole(Part):
    def __iter__(self) -> Iterator[int]:
        return iter(range(SAMPLES - 1, -1, -1))

    def __len__(self) -> int:
        return SAMPLES


def test_an_unknown_sampler_of_a_part_is_warned_of() -> None:
    callback = pruning(0.5, epoch=1)
    with pytest.warns(UserWarning, match=r"Part draws 11 of 22 samples per epoch. DataPruning does not know which"):
        train(callback, loader=DataLoader(make_data(), BATCH, sampler=Part()))
    train(pruning(0.5, epoch=1), loader=DataLoader(make_data(), BATCH, sampler=Whole()))  # a warning would raise


class Growing(Classifier):
    """Finds more samples in each epoch."""

    def train_dataloader(self) -> Any:
        return DataLoader(make_data(SAMPLES + 4 * self.current_epoch), BATCH, shuffle=True)


@pytest.mark.parametrize(
    "make",
    [
        lambda: pruning(0.5, epoch=1),
        lambda: UniformLearning(epoch=1),
        lambda: InfoBatch(0.5, prune_until=1.0),
        lambda: pruning(0.5, "aum", epoch=2),
    ],
    ids=["el2n", "uniform", "info", "aum"],
)
def test_a_data_set_that_changes_its_length_is_refused(make: Any) -> None:
    callback = make()
    trainer = make_trainer(callbacks=[callback], max_epochs=4, reload_dataloaders_every_n_epochs=1)
    with pytest.raises(
        ValueError, match=rf"{callback.display_name} identifies samples by index.*had (22|26).*has (26|30)"
    ):
        trainer.fit(Growing())


@pytest.mark.parametrize("limit", [0.15, 0.2])
def test_a_share_of_the_batches_that_is_one_before_pruning_stays_one(limit: float) -> None:
    callback = pruning(0.5, epoch=1)
    found = train(callback, dataset=make_data(64), epochs=4, limit_train_batches=limit)
    assert found.trainer.global_step == 4
    assert [len(epoch) for epoch in found.watch.epochs] == [BATCH] * 4
    assert {index for epoch in found.watch.epochs[1:] for index in epoch} <= set(callback.scored.kept.tolist())


class Pairs(Classifier):
    """Takes a batch of each of two loaders."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[list[int]] = [[], []]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        for drawn, part in zip(self.drawn, batch, strict=True):
            drawn += part[2].tolist()
        return sum((F.cross_entropy(self(x), y) for x, y, _ in batch), torch.zeros(()))


def test_the_position_of_a_loader_may_be_a_number_or_a_text() -> None:
    def drawn(key: Any) -> list[list[int]]:
        loaders = [
            DataLoader(make_data(size), BATCH, shuffle=True, generator=torch.Generator().manual_seed(0))
            for size in (16, 16)
        ]
        callback = pruning(0.5, keep="random", loader_key=key)
        found = train(callback, Pairs(), loader=loaders, epochs=2)
        assert len(callback.scored.kept) == 8
        assert {*found.module.drawn[int(key)]} == set(callback.scored.kept.tolist())
        assert {*found.module.drawn[1 - int(key)]} == set(range(16))
        return found.module.drawn

    assert drawn(1) == drawn("1")
    assert drawn(0) == drawn("0")


# What is refused, or warned of.


def scores_nothing(pl_module: Any, batch: Any) -> Tensor:
    """Score all samples the same."""
    return torch.zeros(len(batch[0]))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"select": "ccs", "class_floor": 0.2}, "class_floor works only with select='top'"),
        ({"balance": "class", "class_floor": 0.2}, "class_floor works only with .* balance=None"),
        (
            {"prune": 0.5, "class_floor": 0.6},
            r"class_floor=0\.6 must be below the kept share, 1 - prune; got prune=0\.5",
        ),
        (
            {"prune": [0.2, 0.5], "epoch": [1, 2], "class_floor": 0.6},
            r"below the kept share, 1 - prune; got prune=0\.5",
        ),
        ({"loss_index": -1}, "loss_index .*-1"),
        ({"seed": -1}, r"seed .*-1"),
        ({"score_fn": scores_nothing, "score_files": ["scores.npz"]}, "score_fn and score_files would both"),
        ({"score_fn": scores_nothing, "score": "aum"}, "score_fn and score='aum' would both"),
        ({"score_files": ["scores.npz"], "keep": "random"}, "keep='random' ignores scores"),
    ],
)
def test_settings_that_do_not_go_together(arguments: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DataPruning(**arguments)


@pytest.mark.parametrize("prune", [0.3, 0.5, 0.7, 0.8, 0.9])
def test_a_floor_that_is_all_that_is_left_is_refused(prune: float) -> None:
    with pytest.raises(ValueError, match="must be below the kept share"):
        DataPruning(prune, class_floor=round(1 - prune, 1))


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (InfoBatch, "loss_index", -1),
        (InfoBatch, "seed", -1),
        (UniformLearning, "seed", -1),
        (UniformLearning, "loss_index", -1),
        (LossReweighting, "loss_index", -1),
    ],
)
def test_counts_of_the_others(kind: Any, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name} .*{value}"):
        kind(**{name: value})


def test_later_rounds_that_never_come_are_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"rounds that are never reached: max_epochs=3, epoch=\[1, 50\]"):
        train(pruning([0.2, 0.5], epoch=[1, 50]), epochs=3)
    train(pruning([0.2, 0.5], epoch=[1, 2]), epochs=3)  # a warning would raise


class Likelihood(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, _ = batch
        return -self(x).log_softmax(1).gather(1, y[:, None]).mean().neg().exp()


@pytest.mark.parametrize("kind", [InfoBatch, LossReweighting])
def test_who_cannot_see_a_loss_is_named(kind: Any) -> None:
    with pytest.raises(RuntimeError, match=rf"{kind.__name__} needs the loss of each sample"):
        train(kind(), Likelihood())


def scalar(pl_module: Any, batch: Any) -> Tensor:
    return pl_module(batch[0]).norm()


def column(pl_module: Any, batch: Any) -> Tensor:
    return pl_module(batch[0]).norm(dim=1, keepdim=True)


@pytest.mark.parametrize(("score_fn", "shape"), [(scalar, r"\(\)"), (column, r"\(8, 1\)")])
def test_a_score_function_must_return_one_score_a_sample(score_fn: Any, shape: str) -> None:
    with pytest.raises(ValueError, match=rf"score_fn must return one score .*got {shape}\."):
        train(pruning(0.5, epoch=1, score_fn=score_fn))
