"""Steps and functions that return what nothing can be read from are refused in clear words, before the second batch."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_grad.callbacks import InfoBatch, LossReweighting, UniformLearning
from tests.callbacks.data_pruning.test_data_pruning import Classifier, train
from tests.callbacks.data_pruning.test_rows import pruning

MAKE: dict[str, Callable[..., Any]] = {
    **{
        score: lambda score=score, **more: pruning(score, **more)
        for score in ("loss", "grand", "el2n", "aum", "forgetting")
    },
    "vog": lambda **more: pruning("vog", epoch=2, checkpoints=2, **more),
    "by sample": lambda **more: pruning("loss", scores_by="sample", **more),
    "uniform": lambda **more: UniformLearning(epoch=1, **more),
    "info": lambda **more: InfoBatch(0.5, prune_until=1.0, **more),
    "reweighting": lambda **more: LossReweighting(warmup_fraction=0.0, **more),
    "reweighting later": lambda **more: LossReweighting(warmup_fraction=0.5, **more),
}
IN_TRAINING = ("aum", "forgetting", "info", "reweighting", "reweighting later")  # read the first step itself


class Batches(pl.Callback):
    """Counts the batches that are over."""

    count = 0

    def on_train_batch_end(self, *arguments: Any) -> None:
        self.count += 1


def refused(callback: Any, module: Any, words: str, error: type[Exception] = ValueError) -> str:
    """Check that a fit is refused before the second batch, and return the words."""
    batches = Batches()
    with pytest.raises(error, match=words) as raised:
        train(callback, module, epochs=3, more=[batches])
    assert batches.count <= 1
    return str(raised.value)


# Steps.


def cross_entropy(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def losses_by_hand(module: Any, batch: Any) -> Tensor:
    return -module(batch[0]).log_softmax(1)[torch.arange(len(batch[1])), batch[1]]


def by_hand(module: Any, batch: Any) -> Tensor:
    return losses_by_hand(module, batch).mean()


class Step(Classifier):
    """Returns what a function makes of the batch; in training mode a good loss, if it shall be bad in eval mode only."""

    def __init__(self, returns: Callable[..., Any], in_training: bool = True) -> None:
        super().__init__(normalizes=False)
        self.returns, self.in_training = returns, in_training

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.training and not self.in_training:
            return cross_entropy(self, batch)
        return self.returns(self, batch)


RETURNS: dict[str, tuple[Callable[..., Any], str]] = {
    "a dict without loss": (lambda m, b: {"logits": cross_entropy(m, b)}, "got no loss"),
    "a number": (lambda m, b: cross_entropy(m, b).item(), "got no loss"),
    "a loss that is detached": (
        lambda m, b: cross_entropy(m, b).detach(),
        r"got a loss \(\), which requires no gradient",
    ),
    "a vector": (losses_by_hand, r"got a loss \(8,\), which requires a gradient"),
    "a dict with a vector": (lambda m, b: {"loss": losses_by_hand(m, b)}, r"got a loss \(8,\)"),
}


@pytest.mark.parametrize("name", IN_TRAINING)
@pytest.mark.parametrize("returns", [name for name in RETURNS if "vector" not in name])
def test_a_step_without_a_loss_is_refused_by_who_reads_it(returns: str, name: str) -> None:
    function, words = RETURNS[returns]
    refused(MAKE[name](), Step(function), rf"training_step must return a scalar loss that requires a gradient; {words}")


@pytest.mark.parametrize("name", ["info", "reweighting", "reweighting later"])
@pytest.mark.parametrize("returns", [name for name in RETURNS if "vector" in name])
def test_a_step_with_a_vector_is_refused_by_who_weights_it(returns: str, name: str) -> None:
    function, words = RETURNS[returns]
    refused(MAKE[name](), Step(function), rf"training_step must return a scalar loss that requires a gradient; {words}")


@pytest.mark.parametrize("name", ["loss", "grand", "el2n", "vog", "uniform", "info", "reweighting"])
@pytest.mark.parametrize("returns", ["a dict without loss", "a number"])
def test_a_step_without_a_loss_in_eval_mode(returns: str, name: str) -> None:
    function, words = RETURNS[returns]
    said = refused(
        MAKE[name](),
        Step(function, in_training=False),
        rf"must return a scalar loss that requires a gradient; {words}",
    )
    assert "score_fn" in said or name in ("info", "reweighting", "uniform")


@pytest.mark.parametrize("returns", ["a dict without loss", "a number"])
def test_a_step_without_a_loss_for_one_sample(returns: str) -> None:
    function, words = RETURNS[returns]
    words = (
        rf"{words}. DataPruning runs the step on one sample at a time. Leave scores_by at 'batch', and set score_fn="
    )
    refused(MAKE["by sample"](), Step(function, in_training=False), words)


@pytest.mark.parametrize("name", ["loss", "el2n", "vog", "uniform"])
def test_a_step_that_needs_no_gradient_in_eval_mode_is_scored(name: str) -> None:
    class Frugal(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            with torch.set_grad_enabled(self.training or name == "vog"):
                return cross_entropy(self, batch)

    train(MAKE[name](), Frugal(), epochs=3)


def test_another_value_is_not_taken_for_the_call() -> None:
    def doubled(module: Any, batch: Any) -> Tensor:
        loss = cross_entropy(module, batch)
        return loss if module.training else 2 * loss.detach() + 1

    refused(MAKE["loss"](), Step(doubled), "requires no gradient")


RETURNED_NONE = pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
UNSEEN = pytest.mark.filterwarnings("ignore:.*cannot check that rows follow the samples")


@RETURNED_NONE
@pytest.mark.parametrize("name", [name for name in MAKE if name not in IN_TRAINING])
def test_a_step_that_always_returns_none_has_no_scores(name: str) -> None:
    with pytest.raises(
        ValueError, match="found nothing to measure: every batch was None, or training_step returned None"
    ):
        train(MAKE[name](), Step(lambda module, batch: None), epochs=3)


@RETURNED_NONE
@UNSEEN
@pytest.mark.parametrize("name", ["aum", "forgetting"])
def test_a_step_that_always_returns_none_has_no_history(name: str) -> None:
    with pytest.raises(ValueError, match="no step has had a loss so far: each batch was None"):
        train(MAKE[name](), Step(lambda module, batch: None))


@RETURNED_NONE
@UNSEEN
@pytest.mark.parametrize("name", ["info", "reweighting", "reweighting later"])
def test_a_step_that_always_returns_none_has_nothing_to_weight(name: str) -> None:
    train(MAKE[name](), Step(lambda module, batch: None))  # as Lightning then trains on nothing


# Functions.


def swept(*names: str) -> Any:
    return pytest.mark.parametrize("name", names)


LOSSES: dict[str, tuple[Callable[..., Any], str]] = {
    "nothing": (lambda m, b: None, "got NoneType"),
    "a list": (lambda m, b: losses_by_hand(m, b).tolist(), "got list"),
    "a mean": (by_hand, r"got \(\) of torch.float32"),
    "a column": (lambda m, b: losses_by_hand(m, b)[:, None], r"got \(8, 1\)"),
    "too few": (lambda m, b: losses_by_hand(m, b)[1:], r"got \(7,\)"),
    "integers": (lambda m, b: losses_by_hand(m, b).long(), r"got \(8,\) of torch.int64"),
    "complex numbers": (lambda m, b: losses_by_hand(m, b) + 0j, "of torch.complex64"),
}


@swept("loss", "grand", "vog", "info", "reweighting", "reweighting later")
@pytest.mark.parametrize("kind", LOSSES)
def test_losses_that_are_none(kind: str, name: str) -> None:
    function, words = LOSSES[kind]
    callback = MAKE[name](loss_fn=function)
    refused(callback, Step(by_hand), rf"loss_fn must return a floating-point tensor with one loss for each .*{words}")


@swept("grand", "vog", "info", "reweighting", "reweighting later")
def test_losses_without_a_graph(name: str) -> None:
    callback = MAKE[name](loss_fn=lambda module, batch: losses_by_hand(module, batch).detach())
    refused(callback, Step(by_hand), "differentiates the losses of loss_fn, but they require no gradient")


@swept("loss", "grand", "vog", "info", "reweighting", "reweighting later")
def test_losses_that_are_not_finite(name: str) -> None:
    callback = MAKE[name](loss_fn=lambda module, batch: losses_by_hand(module, batch) * torch.nan)
    refused(callback, Step(by_hand), r"Some losses of loss_fn are not finite|none of them is finite")


SCORES: dict[str, tuple[Callable[..., Any], str]] = {
    "nothing": (lambda m, b: None, "got NoneType. Return a tensor"),
    "a pair": (lambda m, b: (losses_by_hand(m, b), b[1]), "got tuple. Return a tensor"),
    "a text": (lambda m, b: "hard", "got str. Return a tensor"),
    "a mean": (by_hand, r"got \(\). Flatten them, or average"),
    "a column": (lambda m, b: losses_by_hand(m, b)[:, None], r"got \(8, 1\). Flatten"),
    "complex numbers": (lambda m, b: losses_by_hand(m, b) + 0j, "got torch.complex64"),
}


@pytest.mark.parametrize("kind", SCORES)
def test_scores_that_are_none(kind: str) -> None:
    function, words = SCORES[kind]
    refused(pruning(score_fn=function), Step(by_hand), rf"score_fn must return one score for each of the 8 .*{words}")


OUTPUTS: dict[str, tuple[Callable[..., Any], str]] = {
    "nothing": (lambda m, b: None, "got NoneType"),
    "logits alone": (lambda m, b: m(b[0]), r"got \(8, 3\) of torch.float32"),
    "a dict": (lambda m, b: {"logits": m(b[0]), "labels": b[1]}, "got dict"),
    "the other order": (lambda m, b: (b[1], m(b[0])), r"got \(8,\) of torch.int64, \(8, 3\)"),
    "labels as numbers": (lambda m, b: (m(b[0]), b[1].float()), r"\(8,\) of torch.float32"),
    "logits as integers": (lambda m, b: (m(b[0]).long(), b[1]), r"got \(8, 3\) of torch.int64"),
    "one logit": (lambda m, b: (m(b[0])[:, 0], b[1]), r"got \(8,\) of torch.float32"),
    "too few": (lambda m, b: (m(b[0])[1:], b[1][1:]), r"got \(7, 3\)"),
}


@swept("el2n", "aum", "forgetting", "uniform")
@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_that_are_none(kind: str, name: str) -> None:
    function, words = OUTPUTS[kind]
    words = rf"outputs_fn must return logits \(8, classes\) and integer labels \(8,\); .*{words}"
    refused(MAKE[name](outputs_fn=function), Step(by_hand), words)


@swept("el2n", "aum", "forgetting", "uniform")
@pytest.mark.parametrize("shift", [3, -1])
def test_labels_that_are_no_class(shift: int, name: str) -> None:
    callback = MAKE[name](outputs_fn=lambda module, batch: (module(batch[0]), batch[1] + shift))
    refused(callback, Step(by_hand), r"labels from 0 to 2 for 3 logits, or -100 .*got (3|4|5|-1)")


@swept("el2n", "aum", "forgetting", "uniform")
@pytest.mark.parametrize("kind", [torch.int32, torch.uint8, torch.bool])
def test_labels_of_other_integers(kind: torch.dtype, name: str) -> None:
    train(MAKE[name](outputs_fn=lambda module, batch: (module(batch[0]), batch[1].to(kind))), Step(by_hand))
