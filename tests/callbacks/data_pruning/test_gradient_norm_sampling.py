"""Samples with large gradients are drawn more often, and the weighted gradient stays that of all samples on average."""

import json
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset, WeightedRandomSampler

from lightning_grad.callbacks import (
    CurriculumWeighting,
    GradientNormSampling,
    InfoBatch,
    LossReweighting,
    RepeatedRandomSubset,
)
from lightning_grad.callbacks.data_pruning._epoch_record import EpochRecord
from lightning_grad.core.losses.sample_losses import SampleLosses
from lightning_grad.functional import sampling_probabilities, sampling_weights
from lightning_grad.functional.data_pruning import gradient_norm_sampling as rules
from lightning_grad.testing import ResumableLoader, assert_identical, make_trainer, state_of
from tests.callbacks.data_pruning.test_data_pruning import BATCH, CLASSES, SAMPLES, Classifier, Manual, make_data, train
from tests.callbacks.data_pruning.test_loss_reweighting import Linear

SMOOTH = 0.8


class Spy(pl.Callback):
    """Remembers, for every epoch, the norms before it, the drawn samples, the weights and the logged numbers."""

    def __init__(self, callback: GradientNormSampling) -> None:
        self.callback = callback
        self.values: list[Tensor | None] = []
        self.kept: list[list[int] | None] = []
        self.weights: list[Tensor | None] = []
        self.logged: list[dict[str, float]] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        callback = self.callback
        self.values.append(None if callback._values is None else callback._values.clone())
        self.kept.append(None if callback.kept is None else callback.kept.tolist())
        self.weights.append(None if callback._weights is None else callback._weights.clone())

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.logged.append({key: float(value) for key, value in trainer.callback_metrics.items()})


def run(callback: GradientNormSampling, *args: Any, **arguments: Any) -> Any:
    spy = Spy(callback)
    found = train(callback, *args, more=[spy], **{"epochs": 5, **arguments})
    found.spy = spy
    return found


@pytest.fixture(scope="module")
def linear() -> Any:
    """A fit of a linear model, whose gradients can be worked by hand."""
    return run(GradientNormSampling(SMOOTH), Linear())


def test_norms_are_those_of_the_batch_that_had_the_sample_last(linear: Any) -> None:
    y, steps = make_data().tensors[1], iter(linear.module.seen)
    known = torch.full((SAMPLES,), math.nan)
    for epoch, values in zip(linear.watch.epochs, linear.spy.values, strict=True):
        assert (values is None) == known.isnan().all()
        if values is not None:
            torch.testing.assert_close(values, known)
        left = len(epoch)
        while left:
            indices, logits = next(steps)
            for row, index in enumerate(indices):
                known[index] = (logits[row].softmax(0) - F.one_hot(y[index], CLASSES)).norm()
            left -= len(indices)


def test_draws_and_weights_follow_the_norms(linear: Any) -> None:
    for epoch in range(1, 5):
        p = sampling_probabilities(linear.spy.values[epoch], SMOOTH * epoch / 5)
        torch.testing.assert_close(linear.spy.weights[epoch], sampling_weights(p))
        kept = linear.spy.kept[epoch]
        assert sorted(linear.watch.epochs[epoch]) == sorted(kept)
        assert len(kept) == SAMPLES
        assert len({*kept}) < SAMPLES, "drawn with replacement"
        logged = linear.spy.logged[epoch]
        assert logged["data/smooth"] == pytest.approx(SMOOTH * epoch / 5)
        assert logged["data/distinct_share"] == pytest.approx(len({*kept}) / SAMPLES)
        assert logged["data/variance_ratio"] == pytest.approx(
            rules.variance_ratio(linear.spy.values[epoch], p), rel=1e-5
        )
    assert len({tuple(kept) for kept in linear.spy.kept[1:]}) == 4


def test_gradient_is_that_of_the_weighted_sum_over_the_size_of_the_batch(linear: Any) -> None:
    steps, weighted = iter(linear.module.steps), 0
    for epoch, weights in zip(linear.watch.epochs, linear.spy.weights, strict=True):
        left = len(epoch)
        while left:
            (x, y, index), matrix, bias, loss, gradient = next(steps)
            w = torch.ones(len(index)) if weights is None else weights[index]
            logits = x @ matrix.T + bias
            expected = (w[:, None] * (logits.softmax(1) - F.one_hot(y, CLASSES))).T @ x / len(index)
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
            assert loss == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-4)  # the step's own value stays
            weighted += int((w != 1).sum())
            left -= len(index)
    assert weighted > SAMPLES


def test_the_first_epoch_is_that_of_a_plain_run(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("lightning_grad.core.callback.rank_zero_info", said.append)
    found, plain = run(GradientNormSampling(), epochs=1), train(pl.Callback(), epochs=1)
    assert found.watch.epochs == plain.watch.epochs
    assert_identical(found.module.state_dict(), plain.module.state_dict())
    assert any("has no effect in a run of one epoch" in line for line in said)


class Skewed(Linear):
    """Stays as it is, and is sure of most samples and right about them."""

    learning_rate = 0.0

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.head.weight.copy_(8 * torch.eye(CLASSES, self.head.in_features))
            self.head.bias.zero_()


def skewed_data() -> TensorDataset:
    """Points that the model is sure of, in various degrees; one in sixteen has a wrong label."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 6, generator=generator)
    y = x[:, :CLASSES].argmax(1)
    y[::16] = (y[::16] + 1) % CLASSES
    return TensorDataset(x, y, torch.arange(64))


def gradients_of(module: Skewed) -> Tensor:
    """Return the gradient of each sample, (n, parameters)."""
    x, y, _ = skewed_data().tensors
    error = (module.head(x).softmax(1) - F.one_hot(y, CLASSES)).detach()
    return (error[:, :, None] * x[:, None]).flatten(1).double()


def drawn_gradients() -> tuple[Tensor, Tensor]:
    """Return the gradients of the steps whose samples are drawn, and those of all samples."""
    found = train(GradientNormSampling(0.9, total_steps=60), Skewed(), skewed_data(), epochs=33, log_every_n_steps=1000)
    steps = found.module.steps[8 * 8 :]  # smooth is 0.9 in all of these
    return torch.stack([step[-1].flatten().double() for step in steps]), gradients_of(found.module)


def standard_errors(found: Tensor, every: Tensor) -> float:
    error = (found.mean(0) - every.mean(0)) / (found.std(0) / len(found) ** 0.5)
    return float(error.square().mean().sqrt())


def test_the_gradient_is_unbiased_with_less_variance_than_uniform_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    found, every = drawn_gradients()
    assert standard_errors(found, every) < 2.0
    uniform = every.var(0, correction=0).sum() / BATCH
    assert found.var(0).sum() < 0.6 * uniform
    monkeypatch.setattr(rules, "sampling_weights", lambda p: torch.ones(len(p)))
    assert standard_errors(*drawn_gradients()) > 5.0, "without weights"


class ClassWeights(Skewed):
    """Divides by the sum of the weights of the classes in the batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps.append([])
        return F.cross_entropy(self.head(batch[0]), batch[1], weight=torch.tensor([1.0, 1.0, 10.0]))


def positions(index: Tensor) -> Tensor:
    """Return which positions a sample has: every fourth sample six, others one."""
    return torch.arange(8) < torch.where(index % 4 == 0, 6, 1)[:, None]


class Ignored(Skewed):
    """Divides by the number of positions in the batch that are not ignored."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, index = batch
        self.steps.append([])
        targets = torch.where(positions(index), y[:, None], -100)
        return F.cross_entropy(self.head(x)[:, :, None].expand(-1, -1, 8), targets)


class Masked(Skewed):
    """The same, by hand."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, index = batch
        self.steps.append([])
        mask = positions(index).float()
        losses = F.cross_entropy(self.head(x), y, reduction="none")[:, None].expand(-1, 8)
        return (losses * mask).sum() / mask.sum()


@pytest.mark.parametrize("kind", [ClassWeights, Ignored, Masked])
def test_the_gradient_is_unbiased_if_batches_divide_by_different_numbers(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gradients(callback: Any, skipped: int) -> Tensor:
        # The mean of a ratio is the ratio of means only for large batches.
        limits = {"epochs": 30, "batch_size": 16, "log_every_n_steps": 1000}
        steps = train(callback, kind(), skewed_data(), **limits).module.steps
        return torch.stack([step[-1].flatten().double() for step in steps[skipped:]])

    every = gradients(pl.Callback(), 0)
    assert standard_errors(gradients(GradientNormSampling(0.9, total_steps=12), 12), every) < 2.0
    monkeypatch.setattr(SampleLosses, "for_other_shares", lambda self, weights: weights)
    assert standard_errors(gradients(GradientNormSampling(0.9, total_steps=12), 12), every) > 4.0


@pytest.mark.parametrize(
    ("arguments", "limits", "expected"),
    [
        ({}, {"epochs": 4}, [0.0, 0.25, 0.5, 0.75]),
        ({}, {"epochs": -1, "max_steps": 9}, [0.0, 1 / 3, 2 / 3]),
        ({"total_steps": 6}, {"epochs": 4}, [0.0, 0.5, 1.0, 1.0]),
    ],
    ids=["epochs", "steps", "stated"],
)
def test_smooth_grows_with_the_run(arguments: Any, limits: Any, expected: list[float]) -> None:
    found = run(GradientNormSampling(SMOOTH, **arguments), **limits)
    logged = [each.get("data/smooth", 0.0) for each in found.spy.logged]
    assert logged == pytest.approx([SMOOTH * share for share in expected])


def test_seeds_draw_differently() -> None:
    first, again, other = (run(GradientNormSampling(seed=seed), epochs=2).spy.kept[1] for seed in (0, 0, 1))
    assert first == again != other


def test_only_the_subset_of_a_sampler_is_drawn() -> None:
    subset = list(range(0, SAMPLES, 2))
    loader = DataLoader(make_data(), 4, sampler=SubsetRandomSampler(subset))
    found = run(GradientNormSampling(1.0), loader=loader, epochs=3)
    for epoch in (1, 2):
        kept = found.spy.kept[epoch]
        assert {*kept} <= {*subset}
        assert len(kept) == len(subset)
        p = sampling_probabilities(found.spy.values[epoch][subset], epoch / 3)
        torch.testing.assert_close(found.spy.weights[epoch][subset], sampling_weights(p))


# Any loss that can be seen.


class Squared(Linear):
    """A loss that is written by hand."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, index = batch
        losses = (self.head(x) - F.one_hot(y, CLASSES)).square().sum(1)
        self.seen.append((index.tolist(), losses.detach()))
        self.steps.append([])
        return losses.mean()


def squares(module: Any, batch: Any) -> Tensor:
    return (module.head(batch[0]) - F.one_hot(batch[1], CLASSES)).square().sum(1)


@pytest.mark.parametrize("loss_fn", [None, squares], ids=["terms", "function"])
def test_the_loss_bounds_the_norm_if_it_is_not_one_call(loss_fn: Any) -> None:
    found = run(GradientNormSampling(SMOOTH, loss_fn=loss_fn), Squared(), epochs=2)
    losses = torch.full((SAMPLES,), math.nan)
    for indices, values in found.module.seen[: math.ceil(SAMPLES / BATCH)]:
        losses[indices] = values
    torch.testing.assert_close(found.spy.values[1], losses)
    p = sampling_probabilities(losses.sqrt(), SMOOTH / 2)
    torch.testing.assert_close(found.spy.weights[1], sampling_weights(p))


def test_a_sample_that_a_batch_has_twice_counts_as_it_came_last() -> None:
    record = EpochRecord()
    record.put([4, 1, 4, 0], torch.tensor([1.0, 2.0, 3.0, 4.0]), 5)
    torch.testing.assert_close(record.values, torch.tensor([4.0, 2.0, math.nan, math.nan, 3.0]), equal_nan=True)


class Broken(Linear):
    """Gets a sample without a value in the second epoch, and skips the batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y, index = batch
        x = torch.where((index == 17)[:, None] & (self.current_epoch == 1), torch.nan, x)
        loss = super().training_step((x, y, index), batch_idx)
        return loss if bool(loss.isfinite()) else None

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        pass


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_norm_that_is_not_finite_keeps_the_last_one() -> None:
    found = run(GradientNormSampling(), Broken(), epochs=4)
    assert 17 in found.watch.epochs[1]
    assert all(values.isfinite().all() for values in found.spy.values[1:])
    assert found.spy.values[2][17] == found.spy.values[1][17]


# Ranks and resuming.


class Write(pl.Callback):
    def __init__(self, callback: GradientNormSampling, folder: Path) -> None:
        self.callback, self.folder = callback, folder
        self.found: list[Any] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch:
            callback = self.callback
            self.found.append([callback._values.tolist(), callback.kept.tolist(), callback._weights.tolist()])

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        path = self.folder / f"{trainer.global_rank}.json"
        path.write_text(json.dumps({"found": self.found, "drawn": trainer.callbacks[0].epochs}))


def test_two_ranks_agree(tmp_path: Path) -> None:
    callback, module = GradientNormSampling(SMOOTH), Classifier(normalizes=False)
    train(callback, module, make_data(20), 4, more=[Write(callback, tmp_path)], strategy="ddp_fork", devices=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["found"] == second["found"]
    for epoch in range(1, 4):
        values, kept, weights = first["found"][epoch - 1]
        assert sorted([*first["drawn"][epoch], *second["drawn"][epoch]]) == sorted(kept)
        p = sampling_probabilities(torch.tensor(values), SMOOTH * epoch / 4)
        assert weights == pytest.approx(sampling_weights(p).tolist()), "n counts the samples of all ranks"


@pytest.mark.parametrize("steps", [6, 7], ids=["end of an epoch", "within an epoch"])
def test_a_resumed_run_is_the_same(steps: int, tmp_path: Path) -> None:
    def fit(ckpt: Any = None) -> Any:
        saving = pl.callbacks.ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=steps)
        trainer = make_trainer(callbacks=[GradientNormSampling(), saving], enable_checkpointing=True)
        module = Classifier()
        trainer.fit(module, ResumableLoader(make_data(), BATCH), ckpt_path=ckpt)
        found = state_of(trainer, module)
        return {key: found[key] for key in found if key != "random"}  # Lightning restores no random streams

    whole = fit()
    assert_identical(fit(tmp_path / f"step={steps}.ckpt"), whole)


def test_another_loss_drops_the_norms(tmp_path: Path) -> None:
    half = run(GradientNormSampling(loss_index=0), epochs=2)
    half.trainer.save_checkpoint(tmp_path / "half.ckpt")
    rest = run(GradientNormSampling(), epochs=4, ckpt=tmp_path / "half.ckpt")
    assert rest.spy.kept[0] is None
    assert rest.spy.kept[1] is not None


# What cannot work.


@pytest.mark.parametrize("other", [InfoBatch, LossReweighting, CurriculumWeighting, RepeatedRandomSubset])
def test_others_that_choose_or_weight_are_refused(other: Any) -> None:
    with pytest.raises(ValueError, match=f"GradientNormSampling and {other.__name__} would both"):
        train(GradientNormSampling(), more=[other()])
    with pytest.raises(ValueError, match=f"{other.__name__} and GradientNormSampling would both"):
        train(other(), more=[GradientNormSampling()])


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(make_data())


class Own(torch.utils.data.Sampler[int]):
    def __iter__(self) -> Any:
        return iter(range(SAMPLES))

    def __len__(self) -> int:
        return SAMPLES


def test_data_that_draw_by_themselves_are_refused() -> None:
    with pytest.raises(TypeError, match="IterableDataset"):
        train(GradientNormSampling(), loader=DataLoader(Stream(), BATCH))
    for sampler in (WeightedRandomSampler([1.0] * SAMPLES, SAMPLES), Own()):
        loader = DataLoader(make_data(), BATCH, sampler=sampler)
        with pytest.raises(TypeError, match=f"draws them with {type(sampler).__name__}.* Use shuffle=True or False"):
            train(GradientNormSampling(), loader=loader)
        train(GradientNormSampling(0.0), loader=loader)


def test_manual_optimization_is_refused() -> None:
    with pytest.raises(ValueError, match=r"GradientNormSampling does not work with manual optimization"):
        train(GradientNormSampling(), Manual())


def test_a_run_without_an_end_is_refused() -> None:
    with pytest.raises(ValueError, match=r"GradientNormSampling needs the length of the run.*total_steps"):
        train(GradientNormSampling(), epochs=-1)
