"""No refusal recommends an argument that its technique does not have, or not together with the score that was asked for."""

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_grad import callbacks as lg
from lightning_grad.callbacks import InfoBatch, LossReweighting, UniformLearning
from tests.callbacks.data_pruning.test_data_pruning import CLASSES, Classifier, make_data, train
from tests.callbacks.data_pruning.test_rows import batches, by_length, pruning

SCORES = ("loss", "grand", "el2n", "margin", "grand-last", "prototypes", "aum", "forgetting", "vog", "less")
MAKE: dict[str, Callable[..., Any]] = {
    **{score: lambda score=score, **more: pruning(score, epoch=2, checkpoints=2, **more) for score in SCORES},
    # Its refusals say to leave scores_by at "batch".
    "by sample": lambda **more: pruning("loss", **more or {"scores_by": "sample"}),
    "a function": lambda **more: pruning(score_fn=one_for_all, **more),
    "losses by a function": lambda **more: pruning("loss", loss_fn=one_for_all, **more),
    "outputs by a function": lambda **more: pruning(outputs_fn=one_for_all, **more),
    "uniform": lambda **more: UniformLearning(epoch=1, **more),
    "info": lambda **more: InfoBatch(0.5, prune_until=1.0, **more),
    "info by a function": lambda **more: InfoBatch(0.5, prune_until=1.0, loss_fn=one_for_all, **more),
    "reweighting": lambda **more: LossReweighting(warmup_fraction=0.0, **more),
}


def one_for_all(module: Any, batch: Any) -> Tensor:
    return module(batch[0]).mean()


def by_hand(logits: Tensor, labels: Tensor) -> Tensor:
    return -logits.log_softmax(1).gather(1, labels[:, None])


def first_rows(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[1:], labels[1:])


def masked(logits: Tensor, labels: Tensor) -> Tensor:
    return (F.cross_entropy(logits, labels, reduction="none") * (labels > 0)).mean()


def two_views(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(torch.cat([logits, logits + 0.1]), torch.cat([labels, labels]))


def dice(logits: Tensor, labels: Tensor) -> Tensor:
    truth, shares = F.one_hot(labels, CLASSES).float(), logits.sigmoid()
    return 1 - (shares * truth).sum() / (shares + truth).sum()


STEPS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "by hand": lambda logits, labels: by_hand(logits, labels).mean(),
    "the hardest half": lambda logits, labels: by_hand(logits, labels).topk(4, dim=0).values.mean(),
    "two classifications": lambda x, y: F.cross_entropy(x, y) + F.cross_entropy(2 * x, y),
    "a classification and a part that mixes": lambda x, y: F.cross_entropy(x, y) + dice(x, y),
    "many labels and a part": lambda x, y: (
        F.binary_cross_entropy_with_logits(x, F.one_hot(y, CLASSES).float()) + x.std()
    ),
    "regression": lambda x, y: F.mse_loss(x, F.one_hot(y, CLASSES).float()),
    "rows left out": first_rows,
    "a mask": masked,
    "two views": two_views,
    "no loss": lambda logits, labels: {"logits": logits},
    "a loss by a layer of its own": lambda x, y: F.l1_loss(x, x.detach().roll(1, 0), reduction="none").sum(1).max(),
}


class Step(Classifier):
    def __init__(self, function: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__(normalizes=False)
        self.function = function
        self.log_variance = nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.function(self(batch[0]), batch[1])


def said_by(callback: Any, module: Any, **arguments: Any) -> str:
    """Return the words of a fit that is refused, with their notes; empty if it is not."""
    try:
        train(callback, module, epochs=3, dataset=make_data(24), **arguments)
    except Exception as error:
        return " ".join([str(error), *getattr(error, "__notes__", [])])
    return ""


VALUES: dict[str, Any] = {"loss_index": 0, "loss_fn": one_for_all, "outputs_fn": one_for_all, "scores_by": "sample"}
# Of functions of torch, and what other classes have that are named with it.
OF_TORCH = {"dim", "enforce_sorted", "requires_grad", "reduction", "collate_fn"}


def check_words(said: str, make: Callable[..., Any]) -> None:
    own = inspect.signature(type(make()).__init__).parameters
    others = {key for name in lg.__all__ if name in said for key in inspect.signature(getattr(lg, name)).parameters}
    for name in set(re.findall(r"\b([a-z_]+)=", said)) - OF_TORCH:
        assert name in own or name in others, f"{name}= is recommended, and there is none: {said}"
    named = re.findall(r"(?:give|set|Give|Set) (loss|loss_fn|outputs_fn|scores_by)=", said)
    for name in set(named):
        try:
            make(**{name: VALUES[name]})
        except (TypeError, ValueError) as error:
            raise AssertionError(f"{name}= is recommended, and refused ({error}): {said}") from None


@pytest.mark.parametrize("name", MAKE)
def test_what_a_refusal_recommends_can_be_given(name: str) -> None:
    refused = 0
    for function in STEPS.values():
        said = said_by(MAKE[name](), Step(function))
        refused += said != ""
        check_words(said, MAKE[name])
    said = said_by(MAKE[name](), Step(F.cross_entropy), loader=batches(by_length))
    check_words(said, MAKE[name])
    assert refused >= 2


def test_words_that_recommend_what_is_not_there_are_found() -> None:
    for said in ("Give score_fn= for it.", "Set scores_by='sample'.", "Give outputs_fn=, a function."):
        with pytest.raises(AssertionError, match="is recommended, and"):
            check_words(said, MAKE["info"])
    with pytest.raises(AssertionError, match="loss_fn= is recommended, and refused"):
        check_words("Give loss_fn=, a function.", MAKE["el2n"])
    check_words("Use DataPruning with score_fn=.", MAKE["info"])
