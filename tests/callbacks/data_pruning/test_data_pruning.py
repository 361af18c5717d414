"""Scores are what they are said to be, the right samples are kept, and what cannot work says so.

The other tests of this folder take their small module and data from here.
"""

import copy
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

from lightning_grad.callbacks import DataPruning
from lightning_grad.functional import prototype_distance
from tests.contract.projects import make_trainer

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
    assert callback.scored.epoch == 1
    assert torch.equal(callback.scored.labels, y)
    assert torch.equal(callback.scored.predictions, module(x).argmax(1))
    assert_kept(callback, values.topk(11).indices)


@pytest.mark.parametrize("score", ["el2n", "grand", "vog", "prototypes"])
def test_scores_do_not_depend_on_workers(score: str) -> None:
    alone, two = DataPruning(0.5, score, epoch=1), DataPruning(0.5, score, epoch=1)
    train(alone)
    train(two, workers=2)
    assert torch.equal(alone.scored.values, two.scored.values)


def test_last_layer_without_bias() -> None:
    module = Classifier()
    module.head = nn.Linear(8, CLASSES, bias=False)
    values, module = scores_of(DataPruning(0.5, "grand-last", epoch=1), module)
    x, y, _ = make_data().tensors
    expected = errors(module, x, y).norm(dim=1) * module.body(x).norm(dim=1)
    torch.testing.assert_close(values, expected.detach().double(), rtol=1e-4, atol=1e-6)


def test_vog_is_that_of_the_gradients_at_its_epochs() -> None:
    callback = DataPruning(0.5, "vog", epoch=4, checkpoints=2)
    run = train(callback, epochs=5)
    x, y, _ = make_data().tensors
    gradients = []
    for epoch in (2, 4):
        inputs = x.clone().requires_grad_(True)
        logits = run.watch.module_at(epoch, run.module)(inputs)
        gradients.append(torch.autograd.grad(logits[torch.arange(SAMPLES), y].sum(), inputs)[0].double())
    raw = torch.stack(gradients).std(0, correction=0).mean(1)
    expected = torch.stack(
        [(raw[i] - raw[y == y[i]].mean()) / raw[y == y[i]].std(correction=0) for i in range(SAMPLES)]
    )
    torch.testing.assert_close(callback.scored.values, expected, rtol=1e-3, atol=1e-4)


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
        for (indices, logits), (others, found) in zip(plain, all_logits(DataPruning(0.0, score, epoch=1)), strict=True):
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


def test_several_rounds_count_from_the_whole_set() -> None:
    callback = DataPruning([0.2, 0.5], epoch=[1, 3])
    run = train(callback, epochs=5)
    assert [len(epoch) for epoch in run.watch.epochs] == [22, 18, 18, 11, 11]
    module = run.watch.module_at(3, run.module)
    expected = BY_HAND["el2n"](module, *make_data().tensors[:2])
    assert callback.scored.epoch == 3
    assert_kept(callback, expected.topk(11).indices)
    assert not set(run.watch.epochs[4]) <= set(run.watch.epochs[1])  # who was left out may come back


def test_prune_0_scores_all_and_keeps_all() -> None:
    callback = DataPruning(0.0, epoch=1)
    run = train(callback)
    assert callback.scored.kept is None
    assert callback.scored.kept_share == 1.0
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
