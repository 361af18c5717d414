"""Scores that need classes find the one call that classifies, whatever else a step adds to its loss."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_grad.callbacks import DataPruning, LossReweighting, UniformLearning
from lightning_grad.testing import assert_identical
from tests.callbacks.data_pruning.test_data_pruning import BY_HAND, CLASSES, Classifier, make_data, scores_of, train
from tests.callbacks.data_pruning.test_rows import pruning


class OwnTerm(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0])
        return F.cross_entropy(logits, batch[1]) + 0.1 * logits.square().mean()


class Rebuilding(Classifier):
    """Has another loss of torch first."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0])
        rebuilt = F.mse_loss(logits, batch[0][:, :CLASSES])
        return rebuilt + F.cross_entropy(logits, batch[1])


class Contrastive(Classifier):
    """Compares two views over the batch, and classifies more and more."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits, others = self(batch[0]), self(batch[0] + 0.1)
        places = torch.arange(len(logits))
        share = min(1.0, self.current_epoch / 4)
        return F.cross_entropy(logits @ others.T, places) + share * F.cross_entropy(logits, batch[1])


class Triplet(Classifier):
    """Has a loss of three inputs, which is not read."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0])
        near = F.triplet_margin_loss(logits, logits.detach() + 0.1, logits.detach().roll(1, 0))
        return {"loss": near + F.cross_entropy(logits, batch[1])}


class Focal(Classifier):
    """Is a function of the classification, and not a sum of it and something else."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        each = F.cross_entropy(self(batch[0]), batch[1], reduction="none")
        return ((1 - (-each).exp()) ** 2 * each).mean()


KINDS = [OwnTerm, Rebuilding, Contrastive, Triplet, Focal]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("score", ["el2n", "margin"])
def test_scores_are_those_of_the_classification(score: str, kind: Any) -> None:
    callback = pruning(score)
    values, module = scores_of(callback, kind())
    x, y, _ = make_data().tensors
    torch.testing.assert_close(values, BY_HAND[score](module, x, y).detach().double(), rtol=1e-4, atol=1e-6)
    assert callback.scored.labels.tolist() == y.tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("score", ["aum", "forgetting", "vog", "prototypes"])
def test_they_are_those_of_a_function_that_gives_the_classes(score: str, kind: Any) -> None:
    found = pruning(score, epoch=2, checkpoints=2, prune=0.0)
    train(found, kind(), epochs=3)
    if score == "vog":  # takes no such function
        expected = pruning(
            score, epoch=2, checkpoints=2, prune=0.0, loss_index=1 if kind in (Rebuilding, Contrastive) else 0
        )
    else:
        expected = pruning(score, epoch=2, prune=0.0, outputs_fn=lambda module, batch: (module(batch[0]), batch[1]))
    train(expected, kind(), epochs=3)
    torch.testing.assert_close(found.scored.values, expected.scored.values, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_uniform_learning_clusters_the_outputs_of_the_classification(kind: Any) -> None:
    found = UniformLearning(epoch=1)
    train(found, kind())
    expected = UniformLearning(epoch=1, outputs_fn=lambda module, batch: (module(batch[0]), batch[1]))
    train(expected, kind())
    assert found._repeated.tolist() == expected._repeated.tolist()


def test_classes_are_balanced() -> None:
    callback = DataPruning(0.5, keep="random", balance="class", epoch=1, num_shown=0, figure=False)
    train(callback, Rebuilding())
    assert callback.scored.labels.tolist() == make_data().tensors[1].tolist()


def test_reading_beside_weights_of_the_whole() -> None:
    reader, weights = pruning("aum", prune=0.0), LossReweighting(warmup_fraction=0.0)
    found = train(reader, Rebuilding(), more=[weights]).module
    expected = train(LossReweighting(warmup_fraction=0.0), Rebuilding()).module
    assert_identical(found.state_dict(), expected.state_dict())
    assert reader.scored.labels.tolist() == make_data().tensors[1].tolist()


class TwoHeads(Classifier):
    """Classifies twice."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(6, CLASSES)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1]) + 0.3 * F.cross_entropy(self.other(batch[0]), batch[1])


class Other(Classifier):
    """Computes a classification that it does not train on."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0])
        self.log("accuracy", F.cross_entropy(logits, batch[1]))
        return logits.square().mean()


class VAE(Classifier):
    """Has one call of a loss, which does not classify."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0])
        return F.mse_loss(logits, batch[0][:, :CLASSES]) + 0.1 * logits.square().mean()


REFUSED = [
    (TwoHeads, "The step has 2 losses, so it is not clear which one to use"),
    (Other, r"takes logits and classes from cross_entropy, but .*: the loss comes from mean \(test_classes"),
    (VAE, "captured mse_loss, which is only a part of what training_step returns"),
]


@pytest.mark.parametrize(("kind", "words"), REFUSED)
@pytest.mark.parametrize("score", ["el2n", "forgetting"])
def test_what_is_not_clear_is_refused(score: str, kind: Any, words: str) -> None:
    if (score, kind) == ("forgetting", VAE):  # is read while it trains, before the rest is looked at
        with pytest.raises(ValueError, match="Correctness needs the loss of a classifier; got mse_loss"):
            train(pruning(score), kind())
    else:
        with pytest.raises(RuntimeError, match=rf"{words}.*set outputs_fn="):
            train(pruning(score), kind())
    train(pruning(score, outputs_fn=lambda module, batch: (module(batch[0]), batch[1])), kind())
