"""InfoBatch leaves out samples of low loss only, and the others stand for them."""

import json
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_grad.callbacks import InfoBatch, LossReweighting
from lightning_grad.functional import InseparableLossError
from tests.callbacks.data_pruning.test_data_pruning import (
    BATCH,
    SAMPLES,
    Classifier,
    Fixed,
    Manual,
    Watch,
    make_data,
    train,
)


class Spy(pl.Callback):
    """Remembers, for every epoch, the last loss of each sample before it, what is kept, and the weights."""

    def __init__(self, callback: InfoBatch) -> None:
        self.callback = callback
        self.losses: list[Tensor | None] = []
        self.kept: list[list[int] | None] = []
        self.weights: list[Tensor | None] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        callback = self.callback
        self.losses.append(None if callback._values is None else callback._values.clone())
        self.kept.append(None if callback.kept is None else callback.kept.tolist())
        self.weights.append(None if callback._weights is None else callback._weights.clone())


def run(callback: InfoBatch, *args: Any, **arguments: Any) -> Any:
    spy = Spy(callback)
    found = train(callback, *args, more=[spy], **{"epochs": 6, **arguments})
    found.spy = spy
    return found


def last_losses(module: Classifier, watch: Watch, y: Tensor) -> list[Tensor]:
    """Return the loss that every sample had last before each epoch, from the logits that the module has kept."""
    steps, found, known = iter(module.seen), [], torch.full((len(y),), math.nan)
    for epoch in watch.epochs:
        found.append(known.clone())
        left = len(epoch)
        while left:
            indices, logits = next(steps)
            known[indices] = F.cross_entropy(logits, y[indices], reduction="none")
            left -= len(indices)
    return found


def test_losses_are_those_last_seen() -> None:
    found = run(InfoBatch(0.5))
    expected = last_losses(found.module, found.watch, make_data().tensors[1])
    assert found.spy.losses[0] is None
    for own, other in zip(found.spy.losses[1:], expected[1:], strict=True):
        torch.testing.assert_close(own, other)


def test_first_epoch_trains_on_all_and_weighs_none() -> None:
    found, plain = run(InfoBatch(0.5), epochs=1), train(pl.Callback(), epochs=1)
    assert sorted(found.watch.epochs[0]) == list(range(SAMPLES))
    assert torch.equal(found.module.head.weight, plain.module.head.weight)


def test_only_samples_of_low_loss_are_left_out_and_the_others_stand_for_them() -> None:
    found = run(InfoBatch(0.5))
    expected = last_losses(found.module, found.watch, make_data().tensors[1])
    left_out = []
    for epoch in range(1, 6):
        losses, kept = expected[epoch], set(found.watch.epochs[epoch])
        low = {index for index in range(SAMPLES) if losses[index] < losses.mean()}
        assert kept | low == set(range(SAMPLES))
        assert len(found.watch.epochs[epoch]) == len(kept)
        dropped = math.floor(len(low) / 2 + 0.5)
        leaves_one = (SAMPLES - dropped) % BATCH == 1  # BatchNorm cannot take such a batch
        assert len(kept) == SAMPLES - dropped + leaves_one
        weights = found.spy.weights[epoch]
        for index in kept:
            expected_weight = len(low) / len(low & kept) if index in low else 1.0
            assert weights[index] == pytest.approx(expected_weight)
        left_out.append(frozenset(range(SAMPLES)) - kept)
    assert len(set(left_out)) > 1


@pytest.mark.parametrize("prune", [0.0, 0.25, 0.75])
def test_share_that_is_left_out(prune: float) -> None:
    found = run(InfoBatch(prune, prune_until=1.0), epochs=2, batch_size=1, module=Classifier(normalizes=False))
    low = int((found.spy.losses[1] < found.spy.losses[1].mean()).sum()) if prune else 0
    assert SAMPLES - len(found.watch.epochs[1]) == math.floor(prune * low + 0.5)


def test_the_same_losses_are_left_out_differently_in_each_epoch() -> None:
    _, *epochs = run(InfoBatch(0.5, prune_until=1.0), Fixed(), epochs=4).spy.kept
    assert len({tuple(kept) for kept in epochs}) == 3
    assert len({len(kept) for kept in epochs}) == 1


def test_no_batch_of_one_is_left_over() -> None:
    size = len(run(InfoBatch(0.5), Fixed(), epochs=2, batch_size=1).watch.epochs[1])
    epoch = run(InfoBatch(0.5), Fixed(), epochs=2, batch_size=size - 1).watch.epochs[1]
    assert len(epoch) == size + 1


def test_seeds_choose_differently() -> None:
    first, again, other = (run(InfoBatch(0.5, seed=seed), epochs=2).spy.kept[1] for seed in (0, 0, 1))
    assert first == again != other


class Linear(Classifier):
    """A linear model, whose gradient can be worked by hand; it keeps the weights before each step."""

    learning_rate = 0.01

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Identity(), nn.Linear(6, 3)
        self.steps: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps.append((batch, self.head.weight.detach().clone(), self.head.bias.detach().clone()))
        return super().training_step(batch, batch_idx)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.steps[-1] = (*self.steps[-1], self.head.weight.grad.clone())


def test_gradient_is_that_of_the_weighted_sum_over_the_size_of_the_batch() -> None:
    callback = InfoBatch(0.5, prune_until=1.0)
    found = run(callback, Linear(), epochs=3)
    steps, weighted = iter(found.module.steps), 0
    for epoch, weights in zip(found.watch.epochs, found.spy.weights, strict=True):
        left = len(epoch)
        while left:
            (x, y, index), matrix, bias, gradient = next(steps)
            w = torch.ones(len(index)) if weights is None else weights[index]
            error = (x @ matrix.T + bias).softmax(1) - F.one_hot(y, 3)
            torch.testing.assert_close(gradient, (w[:, None] * error).T @ x / len(index), rtol=1e-4, atol=1e-6)
            weighted += int((w > 1).sum())
            left -= len(index)
    assert weighted > 5


@pytest.mark.parametrize(("prune_until", "pruned"), [(0.875, 7), (0.5, 4), (1.0, 8), (0.0, 0)])
def test_last_epochs_train_on_all(prune_until: float, pruned: int) -> None:
    found = run(InfoBatch(0.5, prune_until=prune_until), epochs=8)
    sizes = [len(epoch) for epoch in found.watch.epochs]
    assert sizes[0] == SAMPLES
    assert all(size < SAMPLES for size in sizes[1:pruned])
    assert sizes[pruned:] == [SAMPLES] * (8 - pruned)
    assert all(weights is None for weights in found.spy.weights[max(pruned, 1) :])


@pytest.mark.parametrize("epochs", [-1, 50])
def test_a_run_of_so_many_steps_ends_on_all_too(epochs: int) -> None:
    found = run(InfoBatch(0.5, prune_until=0.6), epochs=epochs, max_steps=20)
    sizes = [len(epoch) for epoch in found.watch.epochs]
    steps = [0]
    for size in sizes:
        steps.append(steps[-1] + math.ceil(size / BATCH))
    assert found.trainer.global_step == 20
    for epoch in range(1, len(sizes) - 1):
        assert (sizes[epoch] == SAMPLES) == (steps[epoch] >= 12), (epoch, sizes, steps)
    assert min(sizes[1:4]) < SAMPLES


class Tokens(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Embedding(7, 5), nn.Linear(5, 7)
        self.losses: dict[int, Tensor] = {}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, index = batch
        logits = self(x)
        with torch.no_grad():
            for place, number in enumerate(index.tolist()):
                if (y[place] >= 0).any():
                    self.losses[number] = self.by_hand(logits[place], y[place])
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())

    @staticmethod
    def by_hand(logits: Tensor, y: Tensor) -> Tensor:
        valid = y >= 0
        return (logits.logsumexp(1)[valid] - logits[valid, y[valid]]).mean()


def test_losses_of_tokens_are_means_over_their_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(7, (20, 4), generator=generator)
    y = x.roll(1, 1)
    y[::2, 2:], y[5] = -100, -100
    callback = InfoBatch(0.5, prune_until=1.0)
    found = run(callback, Tokens(), TensorDataset(x, y, torch.arange(20)), epochs=3)
    assert 5 in found.watch.epochs[1]
    assert len(found.watch.epochs[1]) < 20
    callback._take_values(found.trainer)
    expected = torch.stack([found.module.losses.get(index, torch.tensor(math.nan)) for index in range(20)])
    torch.testing.assert_close(callback._values, expected, equal_nan=True)


class Write(pl.Callback):
    def __init__(self, callback: InfoBatch, folder: Path) -> None:
        self.callback, self.folder = callback, folder
        self.found: list[Any] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch:
            callback = self.callback
            self.found.append([callback._values.tolist(), callback.kept.tolist(), callback._weights.tolist()])

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        watch = trainer.callbacks[0]
        path = self.folder / f"{trainer.world_size}-{trainer.global_rank}.json"
        path.write_text(json.dumps({"found": self.found, "drawn": watch.epochs}))


def test_two_ranks_agree(tmp_path: Path) -> None:
    callback = InfoBatch(0.5, prune_until=1.0)
    module = Classifier(normalizes=False)
    train(callback, module, make_data(20), 4, more=[Write(callback, tmp_path)], strategy="ddp_fork", devices=2)
    first, second = (json.loads((tmp_path / f"2-{rank}.json").read_text()) for rank in (0, 1))
    assert first["found"] == second["found"]
    assert len(first["found"]) == 3
    for epoch in range(1, 4):
        losses, kept, _ = first["found"][epoch - 1]
        assert all(math.isfinite(loss) for loss in losses)
        assert len(kept) < 20
        assert len(first["drawn"][epoch]) == len(second["drawn"][epoch])
        assert sorted({*first["drawn"][epoch], *second["drawn"][epoch]}) == kept


# What cannot work.


def test_two_that_weigh_are_refused() -> None:
    with pytest.raises(ValueError, match="InfoBatch and LossReweighting would both weight"):
        train(InfoBatch(), more=[LossReweighting()])


def test_manual_optimization_is_refused() -> None:
    with pytest.raises(ValueError, match=r"InfoBatch does not work with manual optimization.*RepeatedRandomSubset"):
        train(InfoBatch(), Manual())


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(make_data())


def test_data_without_indices_are_refused() -> None:
    with pytest.raises(TypeError, match="IterableDataset"):
        train(InfoBatch(), loader=DataLoader(Stream(), BATCH))


class Root(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, _ = batch
        return F.cross_entropy(self(x), y).sqrt()


def test_a_loss_that_cannot_be_separated_is_told_in_the_first_step() -> None:
    with pytest.raises(InseparableLossError, match=r"sqrt \(test_info_batch.py:\d+\).*use RepeatedRandomSubset"):
        train(InfoBatch(), Root())
