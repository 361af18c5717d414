"""Functions in place of the step, and one sample at a time: the ways out for losses that mix the samples of a batch."""

from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_grad.callbacks import InfoBatch, LossReweighting, UniformLearning
from lightning_grad.core.losses import one_sample
from lightning_grad.functional import InseparableLossError, loss_weights
from lightning_grad.testing import assert_identical
from tests.callbacks.data_pruning.test_data_pruning import (
    BY_HAND,
    CLASSES,
    Classifier,
    Fixed,
    Manual,
    make_data,
    scores_of,
    train,
)
from tests.callbacks.data_pruning.test_rows import pruning


def dice_of(logits: Tensor, truth: Tensor, dims: Any) -> Tensor:
    shares = logits.sigmoid()
    return 1 - 2 * (shares * truth).sum(dims) / (shares + truth).sum(dims)


class Dice(Classifier):
    """Overlap of each sample, taken over the batch: no sum over samples."""

    dims: Any = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return dice_of(self(batch[0]), F.one_hot(batch[1], CLASSES).float(), self.dims).mean()


class DicePerSample(Dice):
    """The same for each sample, summed out of the sight of autograd's names."""

    dims = 1

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return Hidden.apply(dice_of(self(batch[0]), F.one_hot(batch[1], CLASSES).float(), 1)) + 2.0


class Hidden(torch.autograd.Function):
    """A mean that no walk can read."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.size = len(x)
        return x.mean()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0].expand(ctx.size) / ctx.size


def overlaps(module: Any, batch: Any) -> Tensor:
    return dice_of(module(batch[0]), F.one_hot(batch[1], CLASSES).float(), 1)


def outputs(module: Any, batch: Any) -> tuple[Tensor, Tensor]:
    return module(batch[0]), batch[1]


def expected_norms(module: Any, losses: Tensor) -> Tensor:
    found = [torch.autograd.grad(loss, list(module.parameters()), retain_graph=True) for loss in losses]
    return torch.stack([nn.utils.get_total_norm(gradients) for gradients in found])


# loss_fn.


@pytest.mark.parametrize("score", ["loss", "grand"])
def test_scores_by_a_function_for_the_losses(score: str) -> None:
    with pytest.raises(InseparableLossError, match="set loss_fn="):
        train(pruning(score), DicePerSample())
    values, module = scores_of(pruning(score, loss_fn=overlaps), DicePerSample())
    expected = overlaps(module, make_data().tensors)
    expected = expected if score == "loss" else expected_norms(module, expected)
    torch.testing.assert_close(values, expected.detach().double(), rtol=1e-4, atol=1e-6)


def test_vog_by_a_function() -> None:
    callback = pruning("vog", epoch=2, checkpoints=2, loss_fn=overlaps)
    train(callback, DicePerSample(), epochs=3)
    assert callback.scored.values.isfinite().all()


@pytest.mark.parametrize("make", [lambda **more: pruning("loss", **more), InfoBatch, LossReweighting])
def test_a_function_with_another_mean_is_refused_with_both(make: Any) -> None:
    # 0.7 x the loss that is trained
    words = r"takes the loss of each sample from loss_fn, but its mean over a batch is 0\.\d+ and 0\.\d+, while training_step"
    with pytest.raises(ValueError, match=words):
        train(make(loss_fn=lambda module, batch: overlaps(module, batch) * 0.7), DicePerSample(normalizes=False))


@pytest.mark.parametrize("make", [lambda **more: pruning("loss", **more), InfoBatch, LossReweighting])
def test_a_function_of_a_wrong_shape_is_refused(make: Any) -> None:
    arguments = {"loss_fn": lambda module, batch: overlaps(module, batch).mean()}
    callback = LossReweighting(warmup_fraction=0.0, **arguments) if make is LossReweighting else make(**arguments)
    with pytest.raises(
        ValueError, match=r"loss_fn must return a floating-point tensor with one loss for each .*got \(\) of"
    ):
        train(callback, DicePerSample())


def test_a_function_whose_rows_do_not_follow_is_refused() -> None:
    def backwards(module: Any, batch: Any) -> Tensor:
        return overlaps(module, batch).sort().values

    with pytest.raises(RuntimeError, match=r"losses of loss_fn did not follow.*Return one loss for each sample"):
        train(pruning("loss", loss_fn=backwards), DicePerSample())


class Weighted(DicePerSample):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = overlaps(self, batch)
        return (loss_weights(losses, "linupper", 0.5) * losses).sum()


class Decaying(DicePerSample):
    """Adds what belongs to no sample, and has a gradient."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + 0.1 * decay_of(self)


class WeightedDecaying(Weighted):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + 0.1 * decay_of(self)


def decay_of(module: Any) -> Tensor:
    return sum(p.square().mean() for p in module.parameters())


class Dropping(DicePerSample):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(self.body, nn.Dropout(0.5))


class WeightedDropping(Weighted, Dropping):
    pass


@pytest.mark.parametrize(
    ("kind", "by_hand"), [(DicePerSample, Weighted), (Dropping, WeightedDropping), (Decaying, WeightedDecaying)]
)
def test_weights_by_a_function_are_those_by_hand(kind: Any, by_hand: Any) -> None:
    callback = LossReweighting(temperature=0.5, start_temperature=0.5, warmup_fraction=0.0, loss_fn=overlaps)
    found = train(callback, kind(), precision="64-true").module
    expected = train(pl.Callback(), by_hand(), precision="64-true").module
    # Dropout draws the same numbers, and BatchNorm counts each batch once.
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, rtol=1e-10, atol=1e-12)


def test_infobatch_by_a_function() -> None:
    callback = InfoBatch(0.5, prune_until=1.0, loss_fn=overlaps)
    module = train(callback, DicePerSample(normalizes=False), epochs=3).module
    assert len(callback.kept) < 22
    fixed = InfoBatch(
        0.5, prune_until=1.0, loss_fn=lambda module, batch: F.cross_entropy(*outputs(module, batch), reduction="none")
    )
    module = train(fixed, Fixed()).module
    expected = BY_HAND["loss"](module, *make_data().tensors[:2]).detach()
    torch.testing.assert_close(fixed._values.float(), expected, rtol=1e-4, atol=1e-6)


# outputs_fn.


@pytest.mark.parametrize("score", ["el2n", "margin", "grand-last"])
def test_scores_by_a_function_for_logits_and_labels(score: str) -> None:
    with pytest.raises(RuntimeError, match="set outputs_fn="):
        train(pruning(score), Dice())
    values, module = scores_of(pruning(score, outputs_fn=outputs), Dice())
    expected = BY_HAND[score](module, *make_data().tensors[:2]).detach().double()
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("score", ["aum", "forgetting"])
@pytest.mark.parametrize("kind", [Dice, Dropping])
def test_histories_by_a_function_change_no_bit(score: str, kind: Any) -> None:
    callback = pruning(score, prune=0.0, outputs_fn=outputs)
    found, plain = train(callback, kind()).module, train(pl.Callback(), kind()).module
    assert_identical(found.state_dict(), plain.state_dict())
    assert callback.scored.labels.tolist() == make_data().tensors[1].tolist()


def test_uniform_learning_by_a_function() -> None:
    with pytest.raises(RuntimeError, match="set outputs_fn="):
        train(UniformLearning(epoch=1), Dice())
    train(UniformLearning(epoch=1, outputs_fn=outputs), Dice())
    train(UniformLearning(epoch=1, outputs_fn=outputs), Manual())


@pytest.mark.parametrize(
    "wrong", [lambda m, b: m(b[0]), lambda m, b: (b[1], m(b[0])), lambda m, b: (m(b[0])[:2], b[1][:2])]
)
def test_outputs_that_are_none_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"outputs_fn must return logits \(8, classes\) and integer labels"):
        train(pruning(outputs_fn=wrong), Dice())


# One sample at a time.

OFFERED = r"or set scores_by='sample', which runs the step on one sample at a time: such a pass takes about .* in batches of 8"


@pytest.mark.parametrize("score", ["loss", "grand"])
def test_one_sample_at_a_time(score: str) -> None:
    with pytest.raises(InseparableLossError, match=OFFERED):
        train(pruning(score), DicePerSample())
    values, module = scores_of(pruning(score, scores_by="sample"), DicePerSample())
    expected = overlaps(module, make_data().tensors) + 2.0
    expected = expected if score == "loss" else expected_norms(module, expected)
    torch.testing.assert_close(values, expected.detach().double(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("score", ["loss", "grand"])
def test_a_scale_of_the_batch_is_refused(score: str) -> None:
    words = (
        r"batches of one \(scores_by='sample'\), but its mean over a batch is \S+ and \S+, while .* must be equal.*"
        "Leave scores_by at 'batch', and set score_fn="
    )
    with pytest.raises(ValueError, match=words):
        train(pruning(score, scores_by="sample"), Dice())


class Spread(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if len(batch[0]) < 2:
            raise IndexError("two at least")
        return self(batch[0]).square().mean().sqrt()


def test_a_step_that_fails_on_one_sample_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"fails on sample 0 alone: IndexError: two at least"):
        train(pruning("loss", scores_by="sample"), Spread())


class Clocked(DicePerSample):
    """Takes some time for a run and some for each sample, by a clock of its own."""

    now = 0.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        Clocked.now += 3.0 + len(batch[0])
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("score", ["loss", "grand"])
def test_a_refusal_says_how_much_longer_it_takes(score: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_sample, "time", SimpleNamespace(perf_counter=lambda: Clocked.now))
    with pytest.raises(InseparableLossError, match="takes about 3 times as long here as one in batches of 8"):
        train(pruning(score), Clocked())  # 8 x 4 against 11


@pytest.mark.filterwarnings("ignore:.*scores at initialization.*")
@pytest.mark.parametrize("kind", [Dice, Spread])
@pytest.mark.parametrize("arguments", [{"score": "loss"}, {"score": "grand"}, {"score": "loss", "epoch": 0}])
def test_it_is_not_offered_where_it_would_be_refused_too(arguments: Any, kind: Any) -> None:
    with pytest.raises(InseparableLossError, match="set loss_fn=") as error:
        train(pruning(**arguments), kind())
    assert "scores_by" not in str(error.value)


def test_who_looks_at_samples_one_by_one_is_not_told_to() -> None:
    with pytest.raises(RuntimeError, match=r"fails on sample 0 alone.*or leave scores_by at 'batch'") as error:
        train(pruning("loss", scores_by="sample"), Spread())
    assert "scores_by='sample'" not in str(error.value)


# Arguments.


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            {"score": "el2n", "loss_fn": overlaps},
            "loss_fn works only with score='loss', 'grand', 'vog', 'less'; got score='el2n'",
        ),
        ({"score": "loss", "outputs_fn": outputs}, "outputs_fn works only with score='el2n'"),
        (
            {"score": "vog", "scores_by": "sample", "epoch": 2},
            "scores_by='sample' works only with score='loss', 'grand'",
        ),
        ({"score": "loss", "scores_by": "sample", "loss_fn": overlaps}, "loss_fn and scores_by='sample' would both"),
        ({"score": "loss", "loss_index": 0, "loss_fn": overlaps}, "loss_fn and loss_index would both"),
        ({"outputs_fn": outputs, "score_fn": overlaps}, "outputs_fn and score_fn would both"),
    ],
)
def test_what_does_not_go_together(arguments: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pruning(**arguments)


def test_functions_and_an_index_do_not_go_together() -> None:
    with pytest.raises(ValueError, match="loss_index and loss_fn would both"):
        InfoBatch(loss_index=0, loss_fn=overlaps)
    with pytest.raises(ValueError, match="loss_index and loss_fn would both"):
        LossReweighting(loss_index=0, loss_fn=overlaps)
    with pytest.raises(ValueError, match="loss_index and outputs_fn would both"):
        UniformLearning(loss_index=0, outputs_fn=outputs)
