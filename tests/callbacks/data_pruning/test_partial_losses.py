"""A loss of which only a part is seen is refused, and each way out that is named works."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_grad.callbacks import DataPruning, InfoBatch, LossReweighting, RepeatedRandomSubset, UniformLearning
from lightning_grad.functional import InseparableLossError, loss_weights
from tests.callbacks.data_pruning.test_data_pruning import (
    BY_HAND,
    CLASSES,
    Classifier,
    Manual,
    make_data,
    scores_of,
    train,
)
from tests.callbacks.data_pruning.test_rows import pruning

READERS = {
    "el2n": pruning,
    "loss": lambda **more: pruning("loss", **more),
    "grand": lambda **more: pruning("grand", **more),
    "grand-last": lambda **more: pruning("grand-last", **more),
    "vog": lambda **more: pruning("vog", epoch=2, checkpoints=2, **more),
    "aum": lambda **more: pruning("aum", **more),
    "uniform": lambda **more: UniformLearning(epoch=1, **more),
    "info": InfoBatch,
    "reweighting": lambda **more: LossReweighting(warmup_fraction=0.0, **more),
}
PART = (
    r"captured cross_entropy, which is only a part of what training_step returns: (there is also|its positions) .*"
    "Set loss_index=0 to use cross_entropy alone"
)


def logits_and_loss(module: Any, batch: Any) -> tuple[Tensor, Tensor]:
    logits = module(batch[0])
    return logits, F.cross_entropy(logits, batch[1])


class OwnTerm(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits, loss = logits_and_loss(self, batch)
        return loss + 0.1 * logits.square().mean()


class Later(Classifier):
    """Has a term that counts nothing yet."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits, loss = logits_and_loss(self, batch)
        return {"loss": loss + min(1.0, self.current_epoch / 10) * logits.square().mean()}


class Masked(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        each = F.cross_entropy(self(batch[0]), batch[1], reduction="none")
        mask = (batch[0][:, 0] > 0).float()
        return (each * mask).sum() / mask.sum().clamp(min=1)


BY_TERMS = ("loss", "grand", "info", "reweighting")  # see the whole of it
BY_CLASSES = ("el2n", "vog", "aum", "uniform")  # need logits and classes, whatever else the loss consists of


@pytest.mark.parametrize("module", [OwnTerm, Later, Masked])
def test_a_gradient_of_a_part_is_refused(module: Any) -> None:
    with pytest.raises(RuntimeError, match=PART):
        train(READERS["grand-last"](), module(), epochs=3)


@pytest.mark.parametrize("name", BY_CLASSES)
def test_classes_of_which_some_are_not_trained_on_are_refused(name: str) -> None:
    words = (
        "takes logits and classes from cross_entropy, but training_step does not train on all of them: some of its rows have "
        "no part in the loss. Set loss_index=0 to use them nevertheless, or "
    )
    with pytest.raises(RuntimeError, match=words):
        train(READERS[name](), Masked(), epochs=3)
    train(READERS[name](loss_index=0), Masked(), epochs=3)


@pytest.mark.parametrize("name", READERS)
def test_the_call_that_is_named_counts_alone(name: str) -> None:
    train(READERS[name](loss_index=0), OwnTerm(), epochs=3)


@pytest.mark.parametrize("score", ["el2n", "loss", "grand"])
def test_scores_by_the_call_that_is_named(score: str) -> None:
    values, module = scores_of(pruning(score, loss_index=0), OwnTerm())
    expected = BY_HAND[score](module, *make_data().tensors[:2]).detach().double()
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-6)


def losses_of(module: Any, batch: Any) -> Tensor:
    logits = module(batch[0])
    return F.cross_entropy(logits, batch[1], reduction="none") + 0.1 * logits.square().mean(1)


def masked_losses(module: Any, batch: Any) -> Tensor:
    losses = F.cross_entropy(module(batch[0]), batch[1], reduction="none")
    return losses.where(batch[0][:, 0] > 0, torch.nan)  # a sample that does not count has no loss


@pytest.mark.parametrize("kind", [OwnTerm, Masked])
def test_the_whole_of_it_is_scored(kind: Any) -> None:
    values, module = scores_of(pruning("loss"), kind())
    expected = (losses_of if kind is OwnTerm else masked_losses)(module, make_data().tensors)
    torch.testing.assert_close(values, expected.detach().double(), rtol=1e-4, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("kind", [OwnTerm, Masked])
def test_the_gradient_of_the_whole_of_it_is_scored(kind: Any) -> None:
    values, module = scores_of(pruning("grand"), kind())
    losses = (losses_of if kind is OwnTerm else masked_losses)(module, make_data().tensors)
    expected = []
    for loss in losses:
        found = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)
        expected.append(nn.utils.get_total_norm(found) if loss.isfinite() else loss)
    torch.testing.assert_close(values, torch.stack(expected).detach().double(), rtol=1e-4, atol=1e-6, equal_nan=True)


def test_a_term_that_counts_only_later_is_scored_when_it_counts() -> None:
    callback = pruning("loss", epoch=2)
    values, module = scores_of(callback, Later(), epochs=4)
    x, y, _ = make_data().tensors
    losses = F.cross_entropy(module(x), y, reduction="none") + 0.2 * module(x).square().mean(1)
    torch.testing.assert_close(values, losses.detach().double(), rtol=1e-4, atol=1e-6)


def test_other_ways_out() -> None:
    values, module = scores_of(pruning(score_fn=losses_of), OwnTerm())
    torch.testing.assert_close(values, losses_of(module, make_data().tensors).detach().double(), rtol=1e-4, atol=1e-6)
    train(RepeatedRandomSubset(0.5), OwnTerm())

    class Weighted(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            losses = losses_of(self, batch)
            return (loss_weights(losses, "linupper", 1.0) * losses).sum()

    train(RepeatedRandomSubset(0.5), Weighted())


class OnlyInTraining(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits, loss = logits_and_loss(self, batch)
        return loss + 0.1 * logits.square().mean() if self.training else loss


@pytest.mark.parametrize("name", READERS)
def test_who_acts_in_training_looks_at_the_step_in_training(name: str) -> None:
    train(READERS[name](), OnlyInTraining(), epochs=3)


class MaskedInTraining(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        each = F.cross_entropy(self(batch[0]), batch[1], reduction="none")
        return (each * (batch[0][:, 0] > 0)).sum() if self.training else each.mean()


@pytest.mark.parametrize("name", ["aum", "el2n"])
def test_who_reads_in_training_looks_at_the_mask_of_training(name: str) -> None:
    if name == "aum":
        with pytest.raises(RuntimeError, match="some of its rows have no part in the loss"):
            train(READERS[name](), MaskedInTraining(), epochs=3)
    else:
        train(READERS[name](), MaskedInTraining(), epochs=3)


class Harmless(Classifier):
    """Adds what is the same for all samples, and divides, as for accumulation by hand."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        _, loss = logits_and_loss(self, batch)
        total = torch.zeros((), device=self.device)
        total += loss / 2
        total += 1e-3 * sum(p.square().sum() for p in self.parameters())
        return {"loss": total, "logits": None}


@pytest.mark.parametrize("name", READERS)
def test_what_is_the_same_for_all_samples_is_no_part(name: str) -> None:
    train(READERS[name](), Harmless(), epochs=3)


@pytest.mark.parametrize("score", ["loss", "grand"])
def test_scores_leave_out_what_is_the_same_for_all(score: str) -> None:
    values, module = scores_of(pruning(score), Harmless())
    expected = BY_HAND[score](module, *make_data().tensors[:2]).detach().double()
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-6)


class VAE(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.decode = nn.Linear(CLASSES, 6)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        mean = self(batch[0])
        rebuilt = F.mse_loss(self.decode(mean + torch.randn_like(mean)), batch[0])
        return rebuilt + mean.square().mean()


class Dice(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits, truth = self(batch[0]), F.one_hot(batch[1], CLASSES).float()
        shares = logits.sigmoid()
        dice = 1 - 2 * (shares * truth).sum() / (shares + truth).sum()
        return F.binary_cross_entropy_with_logits(logits, truth) + dice


@pytest.mark.parametrize("name", ["loss", "info", "reweighting"])
def test_noise_is_scored_and_weighted_with_a_warning(name: str) -> None:
    with pytest.warns(UserWarning, match="draws random numbers in eval mode too; it (relies on|takes it for)"):
        train(READERS[name](), VAE())
    train(READERS[name](loss_index=0), VAE())


@pytest.mark.parametrize("name", BY_TERMS)
def test_a_loss_that_mixes_the_samples_is_refused_by_function_and_line(name: str) -> None:
    ways_out = "[Ss]et loss_index=0 to use binary_cross_entropy_with_logits alone"
    words = rf"div \(test_partial_losses.py:\d+\) mixes the samples.*{ways_out}"
    with pytest.raises(InseparableLossError, match=words) as error:
        train(READERS[name](), Dice())
    assert error.value.function == "div"
    train(READERS[name](loss_index=0), Dice())


# Losses of which none, or too many, are seen.


class Chunked(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits, _, _ = self(batch[0]), *batch[1:]
        parts = [
            F.cross_entropy(a, b, reduction="sum") for a, b in zip(logits.chunk(3), batch[1].chunk(3), strict=True)
        ]
        return sum(parts) / len(logits)


class InOneCall(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        parts = [self.head(part) for part in self.body(batch[0]).chunk(3)]
        return F.cross_entropy(torch.cat(parts), batch[1])


def test_a_loss_in_chunks_is_scored() -> None:
    values, module = scores_of(pruning("loss"), Chunked())
    expected = F.cross_entropy(module(make_data().tensors[0]), make_data().tensors[1], reduction="none")
    torch.testing.assert_close(values, expected.detach().double(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["info", "reweighting"])
def test_a_loss_in_chunks_is_weighted(name: str) -> None:
    train(READERS[name](), Chunked())


@pytest.mark.parametrize("name", ["el2n", "uniform"])
def test_a_loss_in_chunks_says_what_to_do(name: str) -> None:
    with pytest.raises((RuntimeError, ValueError), match=r"compute it in one call|got 3 rows for 8 samples.*or "):
        train(READERS[name](), Chunked())
    train(READERS[name](), InOneCall())


class HandWritten(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return -self(batch[0]).log_softmax(1).gather(1, batch[1][:, None]).mean()


WAYS_OUT = {
    "el2n": "set score_fn= to a function",
    "aum": "set score_fn= to a function",
    "info": "use RepeatedRandomSubset",
    "reweighting": "weight the losses in training_step with lightning_grad.functional.loss_weights",
    "uniform": "use DataPruning with score_fn=, or RepeatedRandomSubset",
}


class HardestHalf(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        losses = -self(batch[0]).log_softmax(1).gather(1, batch[1][:, None])
        return losses.topk(len(losses) // 2, dim=0).values.mean()


@pytest.mark.parametrize("name", WAYS_OUT)
def test_each_technique_names_a_way_out_that_it_has(name: str) -> None:
    module = HardestHalf if name in BY_TERMS else HandWritten
    with pytest.raises(RuntimeError, match=f"(?i){WAYS_OUT[name]}") as error:
        train(READERS[name](), module())
    assert ("score_fn" in str(error.value)) == ("score_fn" in WAYS_OUT[name])


class Regression(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.mse_loss(self(batch[0]), batch[0][:, :CLASSES])


def test_regression_has_no_classes_to_cluster() -> None:
    with pytest.raises(ValueError, match=r"use DataPruning\(score='loss'\), or RepeatedRandomSubset"):
        train(UniformLearning(epoch=1), Regression())
    train(DataPruning(0.5, score="loss", epoch=1, num_shown=0), Regression())
    train(RepeatedRandomSubset(0.5), Regression())


def test_manual_optimization_has_ways_out() -> None:
    for callback, words in (
        (UniformLearning(epoch=1), r"DataPruning\(score='aum'\) or 'forgetting'"),
        (LossReweighting(), "weight the losses in training_step"),
        (InfoBatch(), "RepeatedRandomSubset"),
    ):
        with pytest.raises(ValueError, match=words):
            train(callback, Manual())
    train(pruning("aum"), Manual())
    train(pruning("forgetting"), Manual())
    train(RepeatedRandomSubset(0.5), Manual())
