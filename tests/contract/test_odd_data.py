"""Batches and steps as real projects have them: rows in another order, rows twice, no batch, no loss.

A technique that credits values to samples is exact there, or refuses in words; every other technique runs.
"""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, default_collate

from lightning_grad.testing import BATCH, BATCHES, CLASSES, TOKENS, WIDTH, make_classifier, make_data, make_trainer
from tests.contract.settings import CANONICAL, TECHNIQUES, Technique

# They credit values to indices.
PAIRING = (
    "DataPruning",
    "DomainReweighting",
    "GradientNormSampling",
    "InfoBatch",
    "UniformLearning",
    "SaliencyUnlearning",
)
DATA = [t for t in TECHNIQUES if t.name in (*PAIRING, "CurriculumWeighting", "LossReweighting", "RepeatedRandomSubset")]
PROBES = [t for t in CANONICAL if getattr(t.kind, "credits_samples", False)]  # they show values of single samples
OTHERS = [t for t in CANONICAL if t not in (*DATA, *PROBES) and t.name != "GhostBatchNorm"]  # without BatchNorm here
BAD = 13  # a sample without a batch, and without a loss


def sort(items: list[Any]) -> Any:
    """Sort by what stands for a length, as for a packed sequence."""
    return default_collate(sorted(items, key=lambda item: -float(item[0].sum())))


def drop(items: list[Any]) -> Any:
    """Return no batch where a sample of it is broken."""
    return None if any(x.isnan().any() for x, _ in items) else default_collate(items)


def make_broken_data() -> TensorDataset:
    x, y = make_data().tensors
    x = x.clone()
    x[BAD] = float("nan")
    return TensorDataset(x, y)


def with_step(step: Any) -> Any:
    """Build the suite's classifier with another training step."""
    module = make_classifier()
    module.__class__ = type("Odd", (type(module),), {"training_step": step})
    return module


def two_views(self: Any, batch: Any, batch_idx: int) -> Tensor:
    x, y = batch
    return F.cross_entropy(self(torch.cat([x, x.flip(1)])), torch.cat([y, y]))


def views_of_a_sample_together(self: Any, batch: Any, batch_idx: int) -> Tensor:
    x, y = batch
    return F.cross_entropy(self(torch.stack([x, x.flip(1)], 1).flatten(0, 1)), y.repeat_interleave(2))


def skip(self: Any, batch: Any, batch_idx: int) -> Tensor | None:
    loss = F.cross_entropy(self(batch[0]), batch[1])
    return loss if bool(loss.isfinite()) else None


def skip_early(self: Any, batch: Any, batch_idx: int) -> Tensor | None:
    return None if bool(batch[0].isnan().any()) else F.cross_entropy(self(batch[0]), batch[1])


def run(
    technique: Technique | None, step: Any = skip_early, data: Any = None, changes: Any = None, **loading: Any
) -> Any:
    callback = pl.Callback() if technique is None else technique.build(**(changes or {}))
    module = with_step(step)
    module.norm = torch.nn.Identity()  # BatchNorm would keep what it has seen of a batch that is skipped
    loader = DataLoader(make_data() if data is None else data, BATCH, **loading)
    validation = DataLoader(make_data(1, 2), BATCH)
    make_trainer(callbacks=[callback], max_epochs=4).fit(module, loader, validation)
    return callback, module


def assert_skipped(callback: Any) -> None:
    skipped = callback.scored.values.isnan().nonzero().flatten().tolist()
    assert BAD in skipped
    assert len(skipped) <= BATCH
    assert callback.balance is not None or set(skipped) <= set(callback.scored.kept.tolist())


def assert_finite(module: pl.LightningModule) -> None:
    for name, parameter in module.named_parameters():
        assert parameter.isfinite().all(), name


@pytest.mark.parametrize("technique", DATA, ids=str)
def test_a_collate_function_that_sorts(technique):
    if technique.name in PAIRING:
        with pytest.raises(RuntimeError, match=r"collate_fn changes the order.*Make collate_fn keep the order"):
            run(technique, collate_fn=sort)
        return
    (_, sorts), (_, plain) = run(technique, collate_fn=sort), run(technique)
    torch.testing.assert_close(sorts.head.weight, plain.head.weight, rtol=0.0, atol=1e-3)
    _, without = run(None)
    assert not torch.allclose(without.head.weight, plain.head.weight, rtol=0.0, atol=1e-2)


@pytest.mark.parametrize("technique", DATA, ids=str)
def test_two_views_joined_by_cat(technique):
    if technique.name == "RepeatedRandomSubset":  # looks at no rows
        assert_finite(run(technique, two_views)[1])
        return
    words = "torch.stack" if technique.name != "UniformLearning" else "one class a sample.*Use|use DataPruning"
    with pytest.raises((RuntimeError, ValueError), match=words):
        run(technique, two_views)
    if technique.name != "UniformLearning":
        changes = {"balance": None} if technique.name == "DataPruning" else None  # a sample of two rows has no class
        assert_finite(run(technique, views_of_a_sample_together, changes=changes)[1])


@pytest.mark.parametrize("step", [skip, skip_early])
@pytest.mark.filterwarnings("ignore:.*training_step. returned .None")
@pytest.mark.parametrize("technique", DATA, ids=str)
def test_a_step_that_returns_none(technique, step):
    callback, module = run(technique, step, make_broken_data())
    assert_finite(module)
    if technique.name == "DataPruning":
        assert_skipped(callback)


@pytest.mark.filterwarnings("ignore:train_dataloader yielded None")
@pytest.mark.parametrize("technique", DATA, ids=str)
def test_a_batch_that_is_none(technique):
    callback, module = run(technique, data=make_broken_data(), collate_fn=drop)
    assert_finite(module)
    if technique.name == "DataPruning":
        assert_skipped(callback)


@pytest.mark.filterwarnings("ignore:train_dataloader yielded None")
@pytest.mark.filterwarnings("ignore:.*training_step. returned .None")
@pytest.mark.parametrize("technique", PROBES, ids=str)
def test_probes_that_credit_samples(technique):
    changes = {"split": "train"}
    with pytest.raises(RuntimeError, match=r"collate_fn changes the order.*Make collate_fn keep the order"):
        run(technique, collate_fn=sort, changes=changes)
    with pytest.raises((RuntimeError, ValueError), match=r"torch\.stack|label of each sample"):
        run(technique, two_views, changes=changes)
    assert_finite(run(technique, data=make_broken_data(), collate_fn=drop, changes=changes)[1])
    assert_finite(run(technique, data=make_broken_data(), changes=changes)[1])


@pytest.mark.filterwarnings("ignore:train_dataloader yielded None")
@pytest.mark.filterwarnings("ignore:.*training_step. returned .None")
@pytest.mark.filterwarnings(
    "ignore:Detected call of .lr_scheduler"
)  # Lightning's, if such a batch ends an accumulation
@pytest.mark.parametrize("technique", OTHERS, ids=str)
def test_others_run(technique):
    assert_finite(run(technique, two_views, collate_fn=sort)[1])
    assert_finite(run(technique, data=make_broken_data(), collate_fn=drop)[1])
    assert_finite(run(technique, data=make_broken_data())[1])


def test_the_data_of_this_suite():
    assert make_data().tensors[0].shape == (BATCH * BATCHES, TOKENS, WIDTH)
    assert make_data().tensors[1].max() == CLASSES - 1
