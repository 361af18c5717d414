"""Samples without a batch, a loss or a finite value are skipped and named, and too few samples are told."""

import logging
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, default_collate

from lightning_grad.callbacks import InfoBatch, LossReweighting, RepeatedRandomSubset, UniformLearning
from lightning_grad.functional import PerSampleGradientNorms
from tests.callbacks.data_pruning.test_data_pruning import BY_HAND, Classifier, Fixed, make_data, scores_of, train
from tests.callbacks.data_pruning.test_rows import pruning

BAD = 10
pytestmark = [
    pytest.mark.filterwarnings("ignore:train_dataloader yielded None"),
    pytest.mark.filterwarnings("ignore:.*training_step. returned .None"),
]


def broken(bad: int = BAD, value: float = float("nan")) -> TensorDataset:
    x, y, index = make_data().tensors
    x = x.clone()
    x[bad] = value
    return TensorDataset(x, y, index)


class Lets(Classifier):
    """Trains on nothing for a batch with a sample that has no number."""

    def __init__(self) -> None:
        super().__init__(normalizes=False)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if self.is_bad(batch[0]) else F.cross_entropy(self(batch[0]), batch[1])

    def is_bad(self, x: Tensor) -> bool:
        return not bool(x.isfinite().all())


class LetsInTraining(Lets):
    """Does so only where it trains: in eval mode each of the other samples has its loss."""

    def is_bad(self, x: Tensor) -> bool:
        return self.training and super().is_bad(x)


def drop(items: list[Any]) -> Any:
    return None if any(x.isnan().any() for x, *_ in items) else default_collate(items)


SCORES = ["el2n", "loss", "margin", "grand", "grand-last", "prototypes", "vog", "aum", "forgetting", "less"]


def scored(score: str, module: Any, data: Any, **arguments: Any) -> Any:
    callback = pruning(score, epoch=2, checkpoints=2)
    train(callback, module, data, epochs=3, **arguments)
    return callback


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("drops", [False, True], ids=["no loss", "no batch"])
def test_samples_without_a_batch_or_a_loss_are_skipped_and_named(
    score: str, drops: bool, caplog: pytest.LogCaptureFixture
) -> None:
    loader = DataLoader(broken(), 8, collate_fn=drop if drops else None)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        callback = scored(score, Lets(), None, loader=loader)
    values = callback.scored.values
    assert values.isnan().nonzero().flatten().tolist() == list(range(8, 16))
    assert set(range(8, 16)) <= set(callback.scored.kept.tolist())
    said = [record.message for record in caplog.records if "skips" in record.message]
    assert len(said) == 1
    assert "skips 8 of 22 samples that have no finite value: 8, 9, 10, 11, 12, 13, 14, 15." in said[0]


@pytest.mark.parametrize("score", ["el2n", "loss", "margin", "prototypes"])
def test_one_sample_without_a_finite_value(score: str) -> None:
    values, module = scores_of(pruning(score), LetsInTraining(), broken())
    assert values.isnan().nonzero().flatten().tolist() == [BAD]
    if score != "prototypes":
        x, y, _ = broken().tensors
        expected = BY_HAND[score](module, x, y).detach().double()
        torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-6, equal_nan=True)


class Picky(Lets):
    """Returns nothing in eval mode for batches of odd samples: all that the second of two ranks looks at."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        is_odd = not self.training and bool((batch[2] % 2 == 1).all())
        return None if is_odd else F.cross_entropy(self(batch[0]), batch[1])


@pytest.mark.filterwarnings("ignore:.*cannot check that rows follow the samples")
@pytest.mark.parametrize(("score", "epoch"), [("el2n", 1), ("vog", 2)])
def test_a_rank_that_finds_nothing_in_its_share_joins_the_others(score: str, epoch: int) -> None:
    callback = pruning(score, epoch=epoch, checkpoints=2)
    arguments = {"epochs": epoch + 1, "batch_size": 4, "strategy": "ddp_fork", "devices": 2}
    train(callback, Picky(), make_data(20), more=[SeesScores(callback)], **arguments)


class SeesScores(pl.Callback):
    def __init__(self, callback: Any) -> None:
        self.callback = callback

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        unknown = self.callback.scored.values.isnan()
        assert bool(unknown[1::2].all())
        assert unknown[::2].sum() < 2  # a class of one sample has no variance to divide by


def test_infinite_values_are_no_values() -> None:
    values, _ = scores_of(pruning("prototypes"), LetsInTraining(), broken(value=float("inf")))
    assert values.isnan().nonzero().flatten().tolist() == [BAD]


@pytest.mark.parametrize("module", [Lets, LetsInTraining])
def test_uniform_learning_repeats_no_sample_without_a_value(module: Any) -> None:
    callback = UniformLearning(epoch=1)
    train(callback, module(), broken())
    count = torch.bincount(callback.kept)
    assert count[BAD] == 1
    assert (count == 2).any()


@pytest.mark.parametrize("make", [InfoBatch, lambda: LossReweighting(warmup_fraction=0.0), lambda: pruning("aum")])
@pytest.mark.parametrize("drops", [False, True])
def test_losses_that_are_read_in_training_survive(make: Any, drops: bool) -> None:
    loader = DataLoader(broken(), 8, shuffle=True, collate_fn=drop if drops else None)
    found = train(make(), Lets(), loader=loader, epochs=4)
    assert all(parameter.isfinite().all() for parameter in found.module.parameters())


class NothingInEval(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        return loss if self.training else None


@pytest.mark.parametrize("make", [pruning, lambda: UniformLearning(epoch=1)])
def test_a_step_that_returns_nothing_in_eval_mode_is_refused_at_the_first_batch(make: Any) -> None:
    with pytest.raises(ValueError, match=r"found nothing to measure.*in eval mode"):
        train(make(), NothingInEval(), epochs=2, limit_train_batches=1)


class SkipsTheFirst(Classifier):
    """Joins two views, which shows only once a batch has a loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y, index = batch
        if 0 in index.tolist():
            return None
        return F.cross_entropy(self(torch.cat([x, -x])), torch.cat([y, y]))


@pytest.mark.parametrize("make", [lambda: LossReweighting(warmup_fraction=0.0), InfoBatch])
def test_rows_are_looked_at_in_the_first_batch_that_has_a_loss(make: Any) -> None:
    with pytest.raises(RuntimeError, match=r"torch\.stack"):
        train(make(), SkipsTheFirst(), loader=DataLoader(make_data(), 8))


# Too little to act on.


def one_sample() -> TensorDataset:
    return TensorDataset(*(tensor[:1] for tensor in make_data().tensors))


@pytest.mark.parametrize(
    "make",
    [lambda: RepeatedRandomSubset(0.5), lambda: pruning(keep="random"), pruning, lambda: pruning("aum"), InfoBatch],
    ids=["random", "chance", "el2n", "aum", "info"],
)
def test_a_data_set_from_which_nothing_can_be_left_out_is_told_once(make: Any) -> None:
    with pytest.warns(UserWarning, match="keeps all 1 samples") as told:
        train(make(), Fixed(), one_sample(), epochs=3)
    assert len([w for w in told if "keeps all" in str(w.message)]) == 1


def test_one_sample_is_not_repeated() -> None:
    found = train(UniformLearning(epoch=1), Fixed(), one_sample(), epochs=3)
    assert found.watch.epochs == [[0], [0], [0]]


def test_a_batch_of_one_has_nothing_to_be_weighted_against() -> None:
    with pytest.warns(UserWarning, match="the batch has only one, so every weight is 1.*larger batches") as told:
        train(LossReweighting(warmup_fraction=0.0), Fixed(), batch_size=1)
    assert len([w for w in told if "the batch has only one" in str(w.message)]) == 1
    train(LossReweighting(temperature=float("inf")), Fixed(), batch_size=1)


# Tables whose gradient is sparse.


class Bags(nn.Module):
    def __init__(self, sparse: bool, bag: bool, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        kind = nn.EmbeddingBag if bag else nn.Embedding
        self.table, self.head, self.bag = kind(9, 4, sparse=sparse, **options), nn.Linear(4, 3), bag

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.table(ids)
        return self.head(rows if self.bag else rows.mean(1))


@pytest.mark.parametrize("bag", [False, True])
@pytest.mark.parametrize("options", [{}, {"padding_idx": 0}, {"max_norm": 1.0}])
def test_gradient_norms_of_a_sparse_table_are_those_of_a_dense_one(bag: bool, options: Any) -> None:
    ids, y = torch.randint(9, (5, 6), generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1])
    norms = []
    for sparse in (False, True):
        module = Bags(sparse, bag, **options)
        norms.append(PerSampleGradientNorms(module)(lambda m=module: F.cross_entropy(m(ids), y, reduction="none")))
    torch.testing.assert_close(*norms)
    assert (norms[0] > 0).all()


class Sparse(Classifier):
    def __init__(self, sparse: bool = True) -> None:
        super().__init__()
        self.net = Bags(sparse, bag=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net((batch[0].abs() * 4).long().clamp(max=8)), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=0.1)


def test_grand_with_a_sparse_table() -> None:
    sparse, dense = (scores_of(pruning("grand"), Sparse(kind))[0] for kind in (True, False))
    torch.testing.assert_close(sparse, dense, rtol=1e-5, atol=0.0)
