"""Scores are what they are said to be, the right samples are kept, and what cannot work says so.

The other tests of this folder take their small module and data from here.
"""

import copy
import csv
import json
import math
import pickle
import random
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler, TensorDataset

from lightning_grad.callbacks import DataPruning
from lightning_grad.data import load_scores
from lightning_grad.functional import prototype_distance
from lightning_grad.testing import make_trainer
from tests.wandb_offline import items, parsed

SAMPLES, WIDTH, CLASSES, BATCH = 22, 6, 3, 8


class Classifier(pl.LightningModule):
    """A small network with BatchNorm, which remembers the logits of every sample that it trains on."""

    learning_rate = 0.2

    def __init__(self, normalizes: bool = True) -> None:
        super().__init__()
        pl.seed_everything(5, verbose=False)
        self.body = nn.Sequential(nn.Linear(WIDTH, 8), nn.BatchNorm1d(8) if normalizes else nn.Identity(), nn.Tanh())
        self.head = nn.Linear(8, CLASSES)
        self.seen: list[tuple[list[int], Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, index = batch
        logits = self(x)
        self.seen.append((index.tolist(), logits.detach()))
        loss = F.cross_entropy(logits, y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


def make_data(samples: int = SAMPLES) -> TensorDataset:
    """Points of three classes, some of them wrong, each with its index."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, WIDTH, generator=generator)
    y = (x[:, :CLASSES] + 0.7 * torch.randn(samples, CLASSES, generator=generator)).argmax(1)
    return TensorDataset(x, y, torch.arange(samples))


class Fixed(Classifier):
    """Stays as it is, and has no BatchNorm, so that ranks see what one process sees."""

    learning_rate = 0.0

    def __init__(self) -> None:
        super().__init__(normalizes=False)


class Watch(pl.Callback):
    """Remembers the weights at the beginning of every epoch, and the samples that each epoch trains on."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []
        self.epochs: list[list[int]] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.states.append(copy.deepcopy(pl_module.state_dict()))
        self.epochs.append([])

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if isinstance(batch, list) and len(batch) == 3:
            self.epochs[-1] += batch[2].tolist()

    def module_at(self, epoch: int, module: Any) -> Any:
        """Return the module as it was when an epoch began, in eval mode."""
        found = copy.deepcopy(module)
        found.load_state_dict(self.states[epoch])
        return found.eval()


def train(
    callback: Any,
    module: Any = None,
    dataset: Any = None,
    epochs: int = 2,
    loader: Any = None,
    more: Any = (),
    ckpt: Any = None,
    batch_size: int = BATCH,
    workers: int = 0,
    **arguments: Any,
) -> SimpleNamespace:
    """Fit, and return the trainer, the module and the watch."""
    watch, module = Watch(), Classifier() if module is None else module
    trainer = make_trainer(callbacks=[watch, callback, *more], max_epochs=epochs, **arguments)
    if loader is None:
        generator = torch.Generator().manual_seed(2)
        given = make_data() if dataset is None else dataset
        loader = DataLoader(given, batch_size, shuffle=True, num_workers=workers, generator=generator)
    trainer.fit(module, loader, ckpt_path=ckpt)
    return SimpleNamespace(trainer=trainer, module=module, watch=watch)


def scores_of(callback: Any, *args: Any, **arguments: Any) -> tuple[Tensor, Any]:
    """Return the scores of a run and the module as it was when they were taken."""
    run = train(callback, *args, **arguments)
    module = copy.deepcopy(run.module).eval()
    module.load_state_dict(run.watch.states[callback.scored.epoch])
    return callback.scored.values, module


def assert_kept(callback: Any, kept: Any) -> None:
    assert callback.scored.kept.tolist() == sorted(torch.as_tensor(kept).tolist())


# The scores, against their definitions.


def errors(module: Any, x: Tensor, y: Tensor) -> Tensor:
    return module(x).softmax(1) - F.one_hot(y, CLASSES)


def margins(logits: Tensor, y: Tensor) -> Tensor:
    others = logits.masked_fill(F.one_hot(y, CLASSES).bool(), -math.inf)
    return logits[torch.arange(len(y)), y] - others.amax(1)


def gradient_norms(module: Any, loss_of: Callable[[int], Tensor], samples: int = SAMPLES) -> Tensor:
    norms = []
    for index in range(samples):
        module.zero_grad()
        loss_of(index).backward()
        norms.append(torch.cat([p.grad.flatten() for p in module.parameters()]).norm())
    return torch.stack(norms)


def grand_by_hand(module: Any, x: Tensor, y: Tensor) -> Tensor:
    return gradient_norms(module, lambda i: F.cross_entropy(module(x[i : i + 1]), y[i : i + 1]))


BY_HAND: dict[str, Callable[..., Tensor]] = {
    "el2n": lambda module, x, y: errors(module, x, y).norm(dim=1),
    "loss": lambda module, x, y: module(x).logsumexp(1) - module(x)[torch.arange(len(y)), y],
    "margin": lambda module, x, y: -margins(module(x), y),
    "grand": grand_by_hand,
    "grand-last": lambda module, x, y: errors(module, x, y).norm(dim=1) * (1 + module.body(x).square().sum(1)).sqrt(),
    "prototypes": lambda module, x, y: prototype_distance(module.body(x).double(), CLASSES, seed=0),
}


@pytest.mark.parametrize("score", BY_HAND)
def test_scores_of_a_pass(score: str) -> None:
    callback = DataPruning(0.5, score, epoch=1)
    values, module = scores_of(callback)
    x, y, _ = make_data().tensors
    expected = BY_HAND[score](module, x, y).detach().double()
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-6)
    assert callback.scored.name == score
    assert re.fullmatch(rf"ScoredSet\(name='{score}', epoch=1, kept \d+ of \d+ samples\)", repr(callback.scored))
    assert callback.scored.epoch == 1
    assert torch.equal(callback.scored.labels, y)
    assert torch.equal(callback.scored.predictions, module(x).argmax(1))
    assert_kept(callback, values.topk(11).indices)


@pytest.mark.parametrize("score", ["el2n", "grand", "vog", "prototypes"])
def test_scores_do_not_depend_on_workers(score: str) -> None:
    alone, two = (DataPruning(0.5, score, epoch=2, checkpoints=2) for _ in range(2))
    train(alone, epochs=3)
    train(two, epochs=3, workers=2)
    assert alone.scored.values.isfinite().all()
    assert torch.equal(alone.scored.values, two.scored.values)


class Masking(Fixed):
    """Looks at random parts of its input, drawn in one of the ways that people use."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.draw = draw

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, _ = batch
        return F.cross_entropy(self(x * self.draw()), y)


@pytest.mark.parametrize(
    "draw", [random.random, np.random.rand, lambda: torch.rand(()).item()], ids=["python", "numpy", "torch"]
)
def test_every_pass_sees_the_same_random_numbers(draw: Any) -> None:
    def scores(epoch: int, seed: int) -> Tensor:
        callback = DataPruning(0.5, epoch=epoch, seed=seed)
        train(callback, Masking(draw), epochs=3)
        return callback.scored.values

    assert torch.equal(scores(1, seed=0), scores(2, seed=0))
    assert not torch.equal(scores(1, seed=0), scores(1, seed=1))


def test_last_layer_without_bias() -> None:
    module = Classifier()
    module.head = nn.Linear(8, CLASSES, bias=False)
    values, module = scores_of(DataPruning(0.5, "grand-last", epoch=1), module)
    x, y, _ = make_data().tensors
    expected = errors(module, x, y).norm(dim=1) * module.body(x).norm(dim=1)
    torch.testing.assert_close(values, expected.detach().double(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("epoch", "passes"), [(4, (2, 4)), ([2, 4], (3, 4))])
def test_vog_is_that_of_the_gradients_since_the_last_round(epoch: Any, passes: tuple[int, int]) -> None:
    callback = DataPruning([0.0] * len(epoch) if isinstance(epoch, list) else 0.0, "vog", epoch, checkpoints=2)
    run = train(callback, epochs=5)
    x, y, _ = make_data().tensors
    gradients = []
    for number in passes:
        inputs = x.clone().requires_grad_(True)
        logits = run.watch.module_at(number, run.module)(inputs)
        gradients.append(torch.autograd.grad(logits[torch.arange(SAMPLES), y].sum(), inputs)[0].double())
    raw = torch.stack(gradients).std(0, correction=0).mean(1)
    expected = torch.stack(
        [(raw[i] - raw[y == y[i]].mean()) / raw[y == y[i]].std(correction=0) for i in range(SAMPLES)]
    )
    torch.testing.assert_close(callback.scored.values, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "arguments", [{"epoch": 1}, {"epoch": 2, "checkpoints": 1}, {"epoch": [2, 3], "prune": [0.1, 0.2]}]
)
def test_one_pass_has_no_variance(arguments: Any) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        DataPruning(score="vog", **arguments)


def test_vog_cannot_begin_behind_its_epoch(tmp_path: Path) -> None:
    train(pl.Callback(), epochs=3).trainer.save_checkpoint(tmp_path / "run.ckpt")
    with pytest.raises(
        ValueError, match=r"no record for this score, which needs at least 2 whole epochs.*epoch to 5 or later"
    ):
        train(DataPruning(0.5, "vog", epoch=2, checkpoints=2), epochs=5, ckpt=tmp_path / "run.ckpt")


def test_vog_of_targets_that_are_no_classes() -> None:
    x, y, index = make_data().tensors
    dataset = TensorDataset(x, F.one_hot(y, CLASSES).float(), index)
    with pytest.raises(ValueError, match=r"cross_entropy with targets \(8, 3\) of torch\.float32"):
        train(DataPruning(0.5, "vog", epoch=2), dataset=dataset, epochs=3)


def logits_by_epoch(module: Classifier, epochs: int) -> Tensor:
    """Return what the module answered at the samples' own batches, (epochs, n, classes)."""
    found = torch.zeros(epochs, SAMPLES, CLASSES)
    batches = math.ceil(SAMPLES / BATCH)
    for number, (indices, logits) in enumerate(module.seen[: epochs * batches]):
        found[number // batches, indices] = logits
    return found


def test_aum_is_the_mean_margin_while_training() -> None:
    callback = DataPruning(0.5, "aum", epoch=3)
    run = train(callback, epochs=4)
    y = make_data().tensors[1]
    expected = -torch.stack([margins(logits, y) for logits in logits_by_epoch(run.module, 3)]).mean(0)
    torch.testing.assert_close(callback.scored.values, expected.double(), rtol=1e-5, atol=1e-6)
    assert_kept(callback, expected.topk(11).indices)


def test_forgetting_counts_how_often_an_answer_went_wrong() -> None:
    callback = DataPruning(0.5, "forgetting", epoch=6)
    module = Classifier()
    module.learning_rate = 2.0
    run = train(callback, module, epochs=7)
    y = make_data().tensors[1]
    right = logits_by_epoch(run.module, 6).argmax(2) == y
    events = (right[:-1] & ~right[1:]).sum(0).double()
    expected = events.masked_fill(~right.any(0), math.inf)
    assert len(expected.unique()) >= 3  # none, some, and never learnt
    assert torch.equal(callback.scored.values, expected)
    assert torch.equal(callback.scored.labels, y)


def test_scoring_leaves_no_trace() -> None:
    def all_logits(*callbacks: Any) -> list[Any]:
        return train(pl.Callback(), epochs=3, more=callbacks).module.seen

    plain = all_logits()
    for score in ("el2n", "grand", "vog", "aum", "prototypes"):
        for (indices, logits), (others, found) in zip(plain, all_logits(DataPruning(0.0, score, epoch=2)), strict=True):
            assert indices == others
            assert torch.equal(logits, found)


# Which samples are kept.


def test_epochs_train_on_what_is_kept() -> None:
    callback = DataPruning(0.5, epoch=1)
    run = train(callback, epochs=3)
    assert sorted(run.watch.epochs[0]) == list(range(SAMPLES))
    for epoch in run.watch.epochs[1:]:
        assert sorted(epoch) == callback.scored.kept.tolist()
    assert run.watch.epochs[1] != run.watch.epochs[2]  # shuffled anew


SCORES = torch.linspace(0, 1, SAMPLES)[torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(1))]
ORDER = SCORES.argsort(descending=True).tolist()


def by_list(pl_module: Any, batch: Any) -> Tensor:
    """Score a sample by its place in a list."""
    return SCORES[batch[2]]


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        ({"prune": 0.5}, ORDER[:11]),
        ({"prune": 0.25}, ORDER[:18]),  # 17 would leave a last batch of one
        ({"prune": 0.5, "keep": "easy"}, ORDER[11:]),
        ({"prune": 0.5, "offset": 0.2}, ORDER[4:15]),
        ({"prune": 0.5, "offset": 0.2, "keep": "easy"}, ORDER[11:]),
    ],
)
def test_what_is_kept(arguments: Any, kept: list[int]) -> None:
    callback = DataPruning(**arguments, epoch=1, score_fn=by_list)
    run = train(callback)
    assert callback.scored.name == "by_list"
    assert_kept(callback, kept)
    assert sorted(run.watch.epochs[1]) == sorted(kept)


def kept_by(**arguments: Any) -> list[int]:
    callback = DataPruning(**{"prune": 0.5, "epoch": 1, **arguments})
    train(callback)
    return callback.scored.kept.tolist()


def test_random_samples_follow_the_seed() -> None:
    first, again, other = (kept_by(keep="random", seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert len(first) == 11


def test_random_samples_from_the_first_batch_on() -> None:
    callback = DataPruning(0.5, keep="random")
    run = train(callback, epochs=1)
    assert sorted(run.watch.epochs[0]) == callback.scored.kept.tolist()
    assert len(run.watch.epochs[0]) == 11


def count_classes(indices: Any) -> list[int]:
    return torch.bincount(make_data().tensors[1][indices], minlength=CLASSES).tolist()


@pytest.mark.parametrize("arguments", [{}, {"keep": "random"}, {"keep": "easy"}])
def test_every_class_keeps_its_share(arguments: Any) -> None:
    whole, kept = count_classes(list(range(SAMPLES))), count_classes(kept_by(balance="class", **arguments))
    assert sum(kept) == 11
    assert all(abs(own - size / 2) < 1 for own, size in zip(kept, whole, strict=True))


def test_least_share_of_a_class() -> None:
    whole = count_classes(list(range(SAMPLES)))
    free, floored = (count_classes(kept_by(prune=0.55, class_floor=floor)) for floor in (0.0, 0.4))
    assert all(own >= 0.4 * size for own, size in zip(floored, whole, strict=True))
    assert any(own < 0.4 * size for own, size in zip(free, whole, strict=True))


def test_ccs_spreads_over_the_scores_behind_the_hardest() -> None:
    callback = DataPruning(0.5, select="ccs", strata=2, offset=0.2, epoch=1, score_fn=by_list)
    train(callback)
    rest = set(ORDER[4:])  # 18, evenly spaced
    assert set(callback.scored.kept.tolist()) < rest
    assert [len(set(part) & set(callback.scored.kept.tolist())) for part in (ORDER[4:13], ORDER[13:])] in (
        [5, 6],
        [6, 5],
    )


def turned_around(pl_module: Any, batch: Any) -> Tensor:
    """Score as :func:`by_list` at first, and later the other way round."""
    return SCORES[batch[2]] * (1 if pl_module.current_epoch < 2 else -1)


def test_several_rounds_count_from_the_whole_set() -> None:
    callback = DataPruning([0.2, 0.5], epoch=[1, 3], score_fn=turned_around)
    run = train(callback, epochs=5)
    assert sorted(run.watch.epochs[0]) == list(range(SAMPLES))
    for epoch in run.watch.epochs[1:3]:
        assert sorted(epoch) == sorted(ORDER[:18])
    for epoch in run.watch.epochs[3:]:
        assert sorted(epoch) == sorted(ORDER[11:])
    assert callback.scored.epoch == 3


def test_prune_0_scores_all_and_keeps_all() -> None:
    callback = DataPruning(0.0, epoch=1)
    run = train(callback)
    assert callback.scored.kept is None
    assert callback.scored.values.isfinite().all()
    assert sorted(run.watch.epochs[1]) == list(range(SAMPLES))


@pytest.mark.parametrize(("budget", "steps", "samples"), [("epochs", [3, 2, 2], 11), ("steps", [3, 3, 3], 22)])
def test_budgets(budget: Any, steps: list[int], samples: int) -> None:
    callback = DataPruning(0.5, epoch=1, budget=budget)
    run = train(callback, epochs=3)
    assert run.trainer.global_step == sum(steps)
    assert [len(epoch) for epoch in run.watch.epochs] == [22, samples, samples]
    counts = torch.bincount(torch.tensor(run.watch.epochs[2]), minlength=SAMPLES)
    assert counts.nonzero().flatten().tolist() == callback.scored.kept.tolist()
    assert set(counts.tolist()) == {0, samples // 11}


def test_only_samples_of_the_sampler_are_scored_and_kept() -> None:
    chosen = [1, 2, 3, 5, 8, 13, 14, 15, 20, 21]
    loader = DataLoader(make_data(), 4, sampler=SubsetRandomSampler(chosen))
    callback = DataPruning(0.4, epoch=1)
    run = train(callback, loader=loader)
    scored = (~callback.scored.values.isnan()).nonzero().flatten().tolist()
    assert scored == chosen
    assert_kept(callback, callback.scored.values.nan_to_num(-1.0).topk(6).indices)
    assert sorted(run.watch.epochs[1]) == callback.scored.kept.tolist()


# Where scores come from.


def test_score_files_are_averaged(tmp_path: Path) -> None:
    dataset, paths, values = make_data(), [str(tmp_path / f"{name}.npz") for name in "ab"], []
    for path, learning_rate in zip(paths, (0.1, 1.0), strict=True):
        module = Classifier()
        module.learning_rate = learning_rate
        callback = DataPruning(0.5, epoch=1, save_scores=path)
        train(callback, module)
        assert torch.equal(load_scores(path, dataset).values, callback.scored.values)
        assert torch.equal(load_scores(path).labels, dataset.tensors[1])
        values.append(callback.scored.values)
    assert not torch.equal(*values)
    callback = DataPruning(0.5, score_files=paths)
    run = train(callback, epochs=1)
    mean = torch.stack(values).mean(0)
    torch.testing.assert_close(callback.scored.values, mean)
    assert_kept(callback, mean.topk(11).indices)
    assert sorted(run.watch.epochs[0]) == callback.scored.kept.tolist()
    assert (callback.scored.name, callback.scored.epoch) == ("el2n", 1)
    assert torch.equal(callback.scored.labels, dataset.tensors[1])


def test_score_files_of_other_data(tmp_path: Path) -> None:
    path = str(tmp_path / "scores.npz")
    train(DataPruning(0.5, epoch=1, save_scores=path))
    x, y, index = make_data().tensors
    other = TensorDataset(x + 1, y, index)
    with pytest.raises(ValueError, match=r"belong to another data set.*strict=False"):
        train(DataPruning(0.5, score_files=[path]), dataset=other)
    callback = DataPruning(0.5, score_files=[path], strict=False)
    with pytest.warns(UserWarning, match="belong to another data set"):
        train(callback, dataset=other)
    assert len(callback.scored.kept) == 11


def test_a_missing_score_file_is_told_before_data_is_loaded() -> None:
    class Unloadable(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            raise AssertionError("loaded")

    with pytest.raises(FileNotFoundError, match=r"DataPruning finds no score file 'nowhere\.npz'"):
        make_trainer(callbacks=[DataPruning(0.5, score_files=["nowhere.npz"])]).fit(Classifier(), Unloadable())


class Noisy(Dataset[Any]):
    def __init__(self) -> None:
        self.clean = make_data()

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        x, y, number = self.clean[index]
        return x + torch.randn(WIDTH), y, number


def test_samples_that_differ_each_time_are_warned_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"differ each time they are read.*score_dataset"):
        train(DataPruning(0.5, epoch=1, save_scores=str(tmp_path / "scores.npz")), dataset=Noisy())


def test_scores_are_those_of_the_data_set_without_augmentation(tmp_path: Path) -> None:
    path = str(tmp_path / "scores.npz")
    callback = DataPruning(0.5, epoch=1, save_scores=path, score_dataset=lambda trainer: make_data())
    values, module = scores_of(callback, dataset=Noisy())
    expected = BY_HAND["el2n"](module, *make_data().tensors[:2]).detach().double()
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(load_scores(path, make_data()).values, values)


def test_scores_come_back_with_a_checkpoint(tmp_path: Path) -> None:
    callback = DataPruning(0.5, epoch=1)
    train(callback, epochs=2).trainer.save_checkpoint(tmp_path / "run.ckpt")
    resumed = DataPruning(0.5, epoch=1)
    run = train(resumed, epochs=3, ckpt=tmp_path / "run.ckpt")
    assert len(run.watch.epochs) == 1
    assert sorted(run.watch.epochs[0]) == callback.scored.kept.tolist()
    for key, value in vars(callback.scored).items():
        found = getattr(resumed.scored, key)
        assert torch.equal(found, value) if isinstance(value, Tensor) else found == value, key


class Manual(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def losses_of(pl_module: Any, batch: Any) -> Tensor:
    """Score by the loss."""
    x, y, _ = batch
    return F.cross_entropy(pl_module(x), y, reduction="none")


def test_manual_optimization_is_refused_unless_nothing_runs_the_step() -> None:
    with pytest.raises(ValueError, match=r"DataPruning with score='el2n'.*manual optimization.*score_fn="):
        train(DataPruning(0.5, epoch=1), Manual())
    callback = DataPruning(0.5, epoch=1, score_fn=losses_of)
    values, module = scores_of(callback, Manual())
    expected = BY_HAND["loss"](module, *make_data().tensors[:2]).detach().double()
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-6)
    run = train(DataPruning(0.5, keep="random"), Manual(), epochs=1)
    assert len(run.watch.epochs[0]) == 11


# Other steps than that of a classifier.


class Tiny(Classifier):
    """A network and a loss of its own, without BatchNorm."""

    def __init__(self, network: nn.Module, loss: Callable[[Any, Any], Tensor]) -> None:
        super().__init__()
        self.body, self.head = network, nn.Identity()
        self.loss = loss

    def training_step(self, batch: Any) -> Tensor:
        return self.loss(self(batch[0]), batch[1])


def test_segmentation_takes_the_mean_over_the_pixels_that_count() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(10, 2, 4, 5, generator=generator), torch.randint(3, (10, 4, 5), generator=generator)
    y[3, :3] = 255
    callback = DataPruning(0.5, epoch=1)
    network = nn.Conv2d(2, 3, 3, padding=1)
    module = Tiny(network, nn.CrossEntropyLoss(ignore_index=255))
    values, module = scores_of(callback, module, TensorDataset(x, y), batch_size=4)
    error = module(x).softmax(1) - F.one_hot(y.clamp(max=2), 3).permute(0, 3, 1, 2)
    counts = (y != 255).flatten(1).double()
    expected = (error.norm(dim=1).flatten(1) * counts).sum(1) / counts.sum(1)
    torch.testing.assert_close(values, expected.detach().double(), rtol=1e-4, atol=1e-6)
    assert callback.scored.labels is None
    assert_kept(callback, expected.topk(5 + 1).indices)  # 5 would leave a last batch of one


@pytest.mark.parametrize("score", ["loss", "el2n", "grand"])
def test_language_model(score: str) -> None:
    def loss(logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())

    generator = torch.Generator().manual_seed(0)
    x = torch.randint(11, (10, 6), generator=generator)
    y = x.roll(-1, 1)
    y[:, -1], y[2, 3:], y[7] = -100, -100, -100
    callback = DataPruning(0.6, score, epoch=1)
    module = Tiny(nn.Sequential(nn.Embedding(11, 5), nn.Linear(5, 11)), loss)
    values, module = scores_of(callback, module, TensorDataset(x, y), batch_size=4)

    def of_sample(index: int) -> Tensor:
        valid = y[index] != -100
        logits, targets = module(x[index])[valid], y[index][valid]
        error = logits.softmax(1) - F.one_hot(targets, 11)
        return error.norm(dim=1).mean() if score == "el2n" else F.cross_entropy(logits, targets)

    others = [index for index in range(10) if index != 7]
    if score == "grand":
        expected = gradient_norms(module, of_sample, 7)
        torch.testing.assert_close(values[:7], expected.double(), rtol=1e-4, atol=1e-6)
    else:
        expected = torch.stack([of_sample(index) for index in others]).detach().double()
        torch.testing.assert_close(values[others], expected, rtol=1e-4, atol=1e-6)
    assert values[7].isnan()
    assert values[others].isfinite().all()
    assert_kept(callback, [7, *values.nan_to_num(-1.0).topk(3).indices.tolist()])


@pytest.mark.parametrize(
    ("loss", "target", "by_hand"),
    [
        (F.binary_cross_entropy_with_logits, (torch.arange(30) % 2).float().reshape(10, 3), torch.sigmoid),
        (F.mse_loss, torch.arange(30.0).reshape(10, 3).cos(), lambda output: output),
    ],
)
def test_several_labels_and_regression(loss: Any, target: Tensor, by_hand: Any) -> None:
    x = torch.arange(20.0).reshape(10, 2).sin()
    callback = DataPruning(0.5, epoch=1)
    values, module = scores_of(callback, Tiny(nn.Linear(2, 3), loss), TensorDataset(x, target))
    expected = (by_hand(module(x)) - target).norm(dim=1).detach().double()
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-6)
    assert callback.scored.labels is None
    assert_kept(callback, expected.topk(5).indices)


@pytest.mark.parametrize("score", ["el2n", "loss", "margin", "grand", "grand-last", "vog", "aum", "forgetting"])
def test_ignored_samples_have_no_score_and_are_kept(score: Any) -> None:
    x, y, index = make_data().tensors
    ignored = torch.tensor([3, 10])
    callback = DataPruning(0.5, score, epoch=2, checkpoints=2)
    module = Classifier()
    train(callback, module, TensorDataset(x, y.index_fill(0, ignored, -100), index), epochs=3)
    assert callback.scored.values.isnan().nonzero().flatten().tolist() == ignored.tolist()
    assert set(ignored.tolist()) < set(callback.scored.kept.tolist())
    assert torch.equal(callback.scored.labels, y.index_fill(0, ignored, -1))


class Hugging(Classifier):
    """Takes a batch by its keys, computes the loss in the model, and needs no batch_idx."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network, self.loss_function = (
                nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(20, 2)),
                nn.CrossEntropyLoss(),
            )

        def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
            logits = self.network(input_ids)
            loss = None if labels is None else self.loss_function(logits.view(-1, 2), labels.view(-1))
            return SimpleNamespace(logits=logits, loss=loss)

    def __init__(self) -> None:
        super().__init__()
        self.model = Hugging.Model()

    def training_step(self, batch: Any) -> Tensor:
        return self.model(**batch).loss


@pytest.mark.parametrize("score", ["el2n", "grand"])
def test_a_model_with_the_loss_in_its_forward(score: str) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randint(7, (12, 5), generator=generator), torch.randint(2, (12,), generator=generator)
    dataset = [{"input_ids": i, "labels": y} for i, y in zip(inputs, labels, strict=True)]
    callback = DataPruning(0.5, score, epoch=1)
    values, module = scores_of(callback, Hugging(), dataset)
    if score == "el2n":
        expected = (module.model(inputs).logits.softmax(1) - F.one_hot(labels)).norm(dim=1).detach()
    else:
        model = module.model
        expected = gradient_norms(model, lambda i: model(inputs[i : i + 1], labels[i : i + 1]).loss, 12)
    torch.testing.assert_close(values, expected.double(), rtol=1e-4, atol=1e-6)
    assert torch.equal(callback.scored.labels, labels)


class TwoLosses(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, _ = batch
        logits = self(x)
        return F.cross_entropy(logits, y) + F.mse_loss(logits, x[:, :CLASSES])


def test_of_two_losses_the_sum_counts() -> None:
    values, module = scores_of(DataPruning(0.5, "loss", epoch=1), TwoLosses())
    x, y, _ = make_data().tensors
    expected = BY_HAND["loss"](module, x, y) + (module(x) - x[:, :CLASSES]).square().mean(1)
    torch.testing.assert_close(values, expected.detach().double(), rtol=1e-4, atol=1e-6)


def test_of_two_losses_one_must_be_named_where_the_sum_is_of_no_use() -> None:
    with pytest.raises(RuntimeError, match=r"0: cross_entropy, 1: mse_loss.*loss_index=0"):
        train(DataPruning(0.5, "grand-last", epoch=1), TwoLosses())


@pytest.mark.parametrize("which", [0, 1])
def test_the_loss_that_is_named_counts(which: int) -> None:
    callback = DataPruning(0.5, "loss", epoch=1, loss_index=which)
    values, module = scores_of(callback, TwoLosses())
    x, y, _ = make_data().tensors
    residual = (module(x) - x[:, :CLASSES]).square().mean(1)
    expected = residual if which else BY_HAND["loss"](module, x, y)
    torch.testing.assert_close(values, expected.detach().double(), rtol=1e-4, atol=1e-6)


class WithMetric(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, _ = batch
        logits = self(x)
        self.log("smoothed", F.cross_entropy(logits.detach(), y, label_smoothing=0.5))
        return F.cross_entropy(logits, y)


def test_a_figure_for_the_log_is_not_the_loss() -> None:
    values, module = scores_of(DataPruning(0.5, "loss", epoch=1), WithMetric())
    expected = BY_HAND["loss"](module, *make_data().tensors[:2]).detach().double()
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-6)


class WithPenalty(Classifier):
    """Differentiates inside its step, as a gradient penalty does."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, _ = batch
        x = x.clone().requires_grad_(True)
        logits = self(x)
        (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
        return F.cross_entropy(logits, y) + 0.1 * gradient.square().sum()


@pytest.mark.parametrize("score", ["el2n", "loss", "grand", "grand-last"])
def test_a_step_that_differentiates(score: str) -> None:
    values, module = scores_of(DataPruning(0.5, score, epoch=1, loss_index=0), WithPenalty())
    expected = BY_HAND[score](module, *make_data().tensors[:2]).detach().double()
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-6)


class HandWritten(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, _ = batch
        return -self(x).log_softmax(1).gather(1, y[:, None]).mean()


def test_a_hand_written_loss_names_the_way_out() -> None:
    with pytest.raises(RuntimeError, match="score_fn="):
        train(DataPruning(0.5, epoch=1), HandWritten())
    callback = DataPruning(0.5, epoch=1, score_fn=losses_of)
    train(callback, HandWritten())
    assert len(callback.scored.kept) == 11


# What is said.


@pytest.mark.parametrize("score", ["el2n", "grand"])
def test_scores_at_initialization_are_warned_of(score: str) -> None:
    with pytest.warns(UserWarning, match=rf"score='{score}'\) scores at initialization.*2303\.14753"):
        train(DataPruning(0.5, score, epoch=0), epochs=1)


def test_few_hard_samples_are_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"hardest 30 % .*select='ccs'"):
        train(DataPruning(0.7, epoch=1))
    for harmless in ({"prune": 0.6}, {"prune": 0.7, "keep": "easy"}, {"prune": 0.7, "select": "ccs"}):
        train(DataPruning(**harmless, epoch=1))  # a warning would raise


def test_an_epoch_that_never_comes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"after 10 epochs.*max_epochs=2.*smaller number"):
        train(DataPruning(0.5))


@pytest.mark.parametrize("score", ["grand", "grand-last", "vog"])
def test_gradient_scores_are_refused_where_parameters_are_sharded(score: str) -> None:
    stand_in = type("FSDPStrategy", (pl.strategies.SingleDeviceStrategy,), {})(device=torch.device("cpu"))
    with pytest.raises(ValueError, match=rf"with score='{score}' needs whole weights, and FSDP1"):
        train(DataPruning(0.5, score, epoch=2), epochs=3, strategy=stand_in)


def test_classes_cannot_be_balanced_where_there_are_none() -> None:
    dataset = TensorDataset(torch.zeros(8, 2), torch.zeros(8, 3))
    with pytest.raises(ValueError, match="balances classes"):
        train(DataPruning(0.5, epoch=1, balance="class"), Tiny(nn.Linear(2, 3), F.mse_loss), dataset)


@pytest.mark.parametrize("epoch", [None, [1, 3]])
def test_a_smoke_test_runs(epoch: Any) -> None:
    prune = [0.1, 0.2] if isinstance(epoch, list) else 0.5
    run = train(DataPruning(prune, epoch=epoch), fast_dev_run=True)
    assert run.trainer.global_step == 1


# Several processes, loggers.


class Write(pl.Callback):
    """Every rank writes what it keeps and what it draws."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kept: list[list[int]] = []
        self.values: list[float] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        (pruning,) = [callback for callback in trainer.callbacks if isinstance(callback, DataPruning)]
        self.kept.append([] if pruning.scored is None else pruning.scored.kept.tolist())
        self.values = [] if pruning.scored is None else pruning.scored.values.tolist()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        (watch,) = [callback for callback in trainer.callbacks if isinstance(callback, Watch)]
        found = {"kept": self.kept, "drawn": watch.epochs, "values": self.values}
        (self.folder / f"{trainer.world_size}-{trainer.global_rank}.json").write_text(json.dumps(found))


@pytest.mark.filterwarnings("ignore:.*keeps only the hardest")
@pytest.mark.parametrize("score", ["grand", "aum"])
def test_two_ranks_keep_what_one_process_keeps(score: Any, tmp_path: Path) -> None:
    for arguments in ({}, {"strategy": "ddp_fork", "devices": 2}):
        callback = DataPruning([0.55, 0.6, 0.65], score, epoch=[1, 2, 3])
        train(callback, Fixed(), make_data(20), 4, more=[Write(tmp_path)], **arguments)
    alone, *ranks = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    # One process rounds 9 up, for a last batch of one.
    assert [len(kept) for kept in alone["kept"]] == [0, 10, 8, 7]
    assert [len(kept) for kept in ranks[0]["kept"]] == [0, 9, 8, 7]
    assert ranks[0]["kept"] == ranks[1]["kept"]
    for rank in ranks:
        assert rank["values"] == pytest.approx(alone["values"], rel=1e-5)
    assert set(ranks[0]["kept"][1]) < set(alone["kept"][1])
    assert ranks[0]["kept"][2:] == alone["kept"][2:]
    for epoch in (1, 2, 3):
        drawn = [rank["drawn"][epoch] for rank in ranks]
        assert len(drawn[0]) == len(drawn[1])
        assert sorted({*drawn[0], *drawn[1]}) == ranks[0]["kept"][epoch]


def test_logs(tmp_path: Path) -> None:
    run = train(DataPruning(0.5, epoch=1, num_shown=0, figure=False), epochs=3, logger=CSVLogger(tmp_path))
    folder = Path(run.trainer.logger.log_dir)
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    values = {key: [float(row[key]) for row in rows if row.get(key)] for key in rows[0]}
    assert values["data/kept_share"] == [1.0, 0.5, 0.5]
    assert values["data/samples_seen"][:3] == [22.0, 33.0, 44.0]
    assert values["data/samples_share"] == pytest.approx([44 / 66])
    assert (folder / "scores_epoch1.npz").is_file()
    assert "el2n" in (folder / "hparams.yaml").read_text()


def test_an_offline_run_of_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staging"))
    wandb.teardown()  # of another test's run, whose settings would stay
    logger = WandbLogger(project="project", save_dir=tmp_path, offline=True)
    train(DataPruning(0.5, epoch=1, num_shown=2, figure=False), logger=logger)
    wandb.finish()
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    config, summary, artifacts = {}, {}, []
    for record in parsed(path):
        config.update(items(record.config.update) if record.HasField("config") else ())
        summary.update(items(record.summary.update) if record.HasField("summary") else ())
        artifacts += [record.artifact] if record.HasField("artifact") else []
    assert config["DataPruning"]["prune"] == 0.5
    assert config["DataPruning"]["score"] == "el2n"
    assert summary["data/samples_share"] == 0.75
    (scores,) = [artifact for artifact in artifacts if artifact.type == "scores"]
    assert re.fullmatch(r"scores_\w+_22_[0-9a-f]{8}", scores.name), "named by class, length and content of the data"
    assert sorted(scores.aliases) == ["el2n", "epoch1", "latest"]


def test_a_callback_with_a_function_for_scores_pickles_after_its_fit() -> None:
    callback = DataPruning(0.5, epoch=1, score_fn=losses_of, num_shown=0)
    train(callback)
    twin = pickle.loads(pickle.dumps(callback))
    assert twin.scored.name == "losses_of"
    assert torch.equal(twin.scored.values, callback.scored.values)


def test_a_function_may_have_the_name_of_a_score() -> None:
    def prototypes(pl_module: Any, batch: Any) -> Tensor:
        return losses_of(pl_module, batch)

    found = [scores_of(DataPruning(0.5, epoch=1, score_fn=f, num_shown=0))[0] for f in (losses_of, prototypes)]
    assert torch.equal(*found)
