"""The gradient is that of the weighted losses, whatever says how hard a sample is, and plain once the curriculum is over."""

import json
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from lightning_grad.callbacks import CurriculumWeighting, InfoBatch, LossReweighting, RepeatedRandomSubset, ZLoss
from lightning_grad.data import SampleScores, save_scores
from lightning_grad.functional import curriculum_weights, easiness
from lightning_grad.testing import assert_identical, state_of
from tests.callbacks.data_pruning.test_data_pruning import BATCH, CLASSES, SAMPLES, Classifier, Manual, make_data, train
from tests.callbacks.data_pruning.test_loss_reweighting import Halves, Linear, Write

M = 2


def first_input(module: pl.LightningModule, batch: Any) -> Tensor:
    return batch[0][:, 0].sigmoid()


def score_file(folder: Path) -> tuple[str, Tensor]:
    """Write scores of the samples; return the path and how easy each sample is."""
    scores = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(3)).double()
    return str(save_scores(SampleScores(scores, "own"), folder / "scores")), easiness(scores)


def expected_gradient(step: Any, easy: Tensor, epoch: int, normalize: bool) -> Tensor:
    (x, y, _), matrix, bias = step[:3]
    weights = curriculum_weights(easy.double(), epoch, M)
    weights = weights / weights.mean() if normalize else weights
    error = ((x @ matrix.T + bias).softmax(1) - F.one_hot(y, CLASSES)).double()
    return (weights[:, None] * error).T @ x.double() / len(y)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("by", ["loss", "file", "function"])
def test_gradient_is_that_of_the_weighted_losses(by: str, normalize: bool, tmp_path: Path) -> None:
    path, known = score_file(tmp_path)
    given = {"loss": {}, "file": {"score_files": [path]}, "function": {"easiness_fn": first_input}}[by]
    module = train(CurriculumWeighting(M, normalize=normalize, **given), Linear(), epochs=4).module
    plain = train(pl.Callback(), Linear(), epochs=4).module
    of_epoch = len(module.steps) // 4
    for number, step in enumerate(module.steps):
        (x, y, index), matrix, bias, loss, gradient = step
        losses = F.cross_entropy(x @ matrix.T + bias, y, reduction="none")
        easy = {"loss": easiness(losses), "file": known[index], "function": x[:, 0].sigmoid()}[by]
        expected = expected_gradient(step, easy, number // of_epoch, normalize)
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-6)
        assert loss == pytest.approx(losses.mean().item(), rel=1e-4)  # the step's own value stays
    assert (module.steps[0][-1] - plain.steps[0][-1]).abs().max() > 1e-2


class Put(pl.Callback):
    """Puts other weights into the module when an epoch begins."""

    def __init__(self, epoch: int, weights: Any) -> None:
        self.epoch, self.weights = epoch, weights

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            pl_module.load_state_dict(self.weights)


def test_after_m_epochs_gradients_are_bitwise_the_plain_ones() -> None:
    run = train(CurriculumWeighting(M), Linear(), epochs=3)
    begins = Put(M, run.watch.states[M])
    plain = train(begins, Linear(), epochs=3)
    later = list(zip(run.module.steps, plain.module.steps, strict=True))[-3:]
    for own, other in later:
        assert_identical(own, other)
    weighted, unweighted = run.module.steps[0], plain.module.steps[0]
    assert not torch.equal(weighted[-1], unweighted[-1])


def test_two_ranks_compare_the_samples_of_both(tmp_path: Path) -> None:
    for arguments in ({}, {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False}):
        callback = CurriculumWeighting(M, normalize=True)
        train(callback, Halves(), loader=DataLoader(make_data(20), BATCH), more=[Write(tmp_path)], **arguments)
    alone, first, second = (
        torch.tensor(json.loads((tmp_path / f"{name}.json").read_text())) for name in ("1-0", "2-0", "2-1")
    )
    assert torch.equal(first, second)
    torch.testing.assert_close(first, alone, rtol=1e-4, atol=1e-6)


def test_a_resumed_run_with_score_files(tmp_path: Path) -> None:
    path, _ = score_file(tmp_path)

    def run(epochs: int, ckpt: Any = None) -> Any:
        loader = DataLoader(make_data(), BATCH)
        return train(
            CurriculumWeighting(4, [path]), loader=loader, epochs=epochs, ckpt=ckpt, enable_checkpointing=False
        )

    whole, half = run(4), run(2)
    half.trainer.save_checkpoint(tmp_path / "half.ckpt")
    rest = run(4, tmp_path / "half.ckpt")
    assert_identical(state_of(rest.trainer, rest.module), state_of(whole.trainer, whole.module))


def test_score_files_beside_a_callback_that_chooses_samples(tmp_path: Path) -> None:
    path, known = score_file(tmp_path)
    for callbacks in ([CurriculumWeighting(M, [path]), RepeatedRandomSubset(0.5)][::order] for order in (1, -1)):
        module = train(callbacks[0], Linear(), epochs=1, more=callbacks[1:]).module
        for step in module.steps:
            expected = expected_gradient(step, known[step[0][2]], 0, normalize=False)
            torch.testing.assert_close(step[-1].double(), expected, rtol=1e-4, atol=1e-6)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(make_data(16))


def test_iterable_data(tmp_path: Path) -> None:
    train(CurriculumWeighting(), loader=DataLoader(Stream(), BATCH), epochs=1)
    with pytest.raises(TypeError, match="the samples of the IterableDataset Stream have none"):
        train(CurriculumWeighting(score_files=[score_file(tmp_path)[0]]), loader=DataLoader(Stream(), BATCH), epochs=1)


def test_other_data_than_that_of_the_scores(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"belong to another data set: the length \(22 against 12\)"):
        train(CurriculumWeighting(score_files=[score_file(tmp_path)[0]]), dataset=make_data(12))


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda module, batch: batch[0], r"a floating-point tensor \(8,\).* got torch.float32 of shape \(8, 6\)"),
        (lambda module, batch: batch[0][:, 0] * 0 + 2.0, r"got numbers from 2 to 2"),
        (lambda module, batch: batch[1], "got torch.int64 of shape"),
        (lambda module, batch: 0.5, "got float"),
    ],
)
def test_a_function_that_returns_something_else(function: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"easiness_fn of CurriculumWeighting must return .*{words}"):
        train(CurriculumWeighting(easiness_fn=function))


def test_logs() -> None:
    run = train(CurriculumWeighting(4, easiness_fn=first_input), Linear(), epochs=2, log_every_n_steps=1)
    x = run.module.steps[-1][0][0]
    metrics = run.trainer.callback_metrics
    assert set(metrics) == {"loss", "data/curriculum", "data/mean_weight", "data/loss", "data/weighted_loss"}
    assert metrics["data/curriculum"] == 0.25
    assert metrics["data/mean_weight"] == pytest.approx(float(curriculum_weights(x[:, 0].sigmoid(), 1, 4).mean()))


def test_a_batch_of_hard_samples_only_has_no_gradient(tmp_path: Path) -> None:
    callback = CurriculumWeighting(M, easiness_fn=lambda module, batch: torch.zeros(len(batch[0])), normalize=True)
    module = train(callback, Linear(), epochs=1).module
    assert all(torch.equal(step[-1], torch.zeros_like(step[-1])) for step in module.steps)


@pytest.mark.parametrize("other", [LossReweighting, InfoBatch, ZLoss])
def test_one_writer_of_a_loss(other: Any) -> None:
    what = "change the loss of a step" if other is ZLoss else "weight the samples of a batch"
    with pytest.raises(ValueError, match=f"CurriculumWeighting and {other.__name__} would both {what}. Keep one"):
        train(CurriculumWeighting(), more=[other()])


def test_what_it_refuses(tmp_path: Path) -> None:
    path, _ = score_file(tmp_path)
    with pytest.raises(ValueError, match="score_files and easiness_fn would both say how hard a sample is"):
        CurriculumWeighting(score_files=[path], easiness_fn=first_input)
    with pytest.raises(ValueError, match="CurriculumWeighting does not work with manual optimization"):
        train(CurriculumWeighting(), Manual())
    with pytest.raises(ValueError, match=re.escape("must be at least 0")):
        CurriculumWeighting(-1)


class Sorting(Classifier):
    """Computes with the samples in the order of their first entry."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        order = batch[0][:, 0].argsort()
        return super().training_step([part[order] for part in batch], batch_idx)


def test_files_need_rows_that_follow_their_samples(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="CurriculumWeighting"):
        train(CurriculumWeighting(score_files=[score_file(tmp_path)[0]]), Sorting())
    train(CurriculumWeighting(), Sorting(), epochs=1)  # by loss, any order will do
