"""On the edge: which input is meant, what happens where a later batch lacks it, and what is said where nothing works."""

from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_grad.callbacks import AccuracyGradientLR, AdversarialEvaluation
from lightning_grad.callbacks.adversarial import _overfitting, _places
from lightning_grad.testing import make_trainer
from tests.callbacks.adversarial.attacked import Linear, as_batches, attacker, points, train
from tests.callbacks.schedules.dictated import Dictated
from tests.callbacks.schedules.dictated import train as train_dictated

FLOATS = torch.arange(8.0).view(4, 2) / 8
TOKENS = torch.tensor([[0, 1, 2], [2, 2, 0], [1, 0, 0], [2, 1, 0]])
IMAGES = torch.ones(4, 3, 2, 2, dtype=torch.uint8)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what is told by rank_zero_info."""
    messages: list[str] = []
    for module in (_overfitting, _places):
        monkeypatch.setattr(module, "rank_zero_info", messages.append)
    return messages


def evaluate(module: pl.LightningModule, loaders: Any, **arguments: Any) -> None:
    callback = AdversarialEvaluation(0.25, **{"steps": 1, **arguments})
    make_trainer(callbacks=[callback]).validate(module, loaders, verbose=False)


# Which input is meant.


class MultiLabel(pl.LightningModule):
    """Embeds integers and is judged by many floating labels of each sample."""

    seen: ClassVar[list[Tensor]] = []  # what an instance keeps is put back after an attack

    def __init__(self, embeds: bool = True) -> None:
        super().__init__()
        self.words = nn.Embedding(3, 2) if embeds else nn.Linear(3, 2)
        self.embeds = embeds
        self.seen.clear()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        tokens, labels = batch.values() if isinstance(batch, dict) else batch
        self.seen.append(labels.detach().clone())
        logits = self.words(tokens).mean(1) if self.embeds else self.words(tokens.float()).flatten(1)[:, :2]
        return F.binary_cross_entropy_with_logits(logits, labels)

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize("batch", [(TOKENS, FLOATS), {"input_ids": TOKENS, "labels": FLOATS}])
def test_floating_targets_behind_tokens_are_not_attacked(batch: Any, told: list[str]) -> None:
    module = MultiLabel()
    train(attacker(), module, as_batches([batch]))
    evaluate(module, as_batches([batch]))
    assert len(module.seen) > 4
    assert all(torch.equal(seen, FLOATS) for seen in module.seen)
    assert len(told) == 2
    assert all("perturbs the output of the first nn.Embedding" in each for each in told)


@pytest.mark.parametrize(
    ("module", "batch", "said"),
    [
        (
            MultiLabel(False),
            (TOKENS, FLOATS),
            r"dimensions, batch\[0\], has dtype torch\.int64, and the module has no nn",
        ),
        (
            MultiLabel(False),
            (IMAGES, FLOATS),
            r"dimensions, batch\[0\], has dtype torch\.uint8, and the module has no nn",
        ),
        (MultiLabel(), (IMAGES, FLOATS), r"batch\[0\], has dtype torch\.uint8, and an nn\.Embedding cannot take it"),
        (MultiLabel(False), {"y": FLOATS}, r"has no floating-point tensor .*\(except targets, masks and weights\)"),
    ],
)
def test_integers_before_the_first_floating_tensor_are_refused(module: Any, batch: Any, said: str) -> None:
    said = rf"AdversarialTraining needs an input with a gradient, but .*{said}.*Convert integer images.*input_key to a"
    with pytest.raises(TypeError, match=said):
        train(attacker(), module, as_batches([batch]))


def test_a_key_may_name_what_is_not_meant_by_default() -> None:
    module = MultiLabel()
    train(attacker(input_key="labels"), module, as_batches([{"ids": TOKENS, "labels": FLOATS}]))
    assert not torch.equal(module.seen[-1], FLOATS)


# A later batch of another form.


class Varying(Linear):
    """Takes what is there: of two loaders, or of a dictionary."""

    def input_of(self, batch: Any) -> Tensor:
        here = [value for value in batch.values() if value is not None]
        return here[0][0] if isinstance(here[0], list) else here[0]

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.training_step(batch, batch_idx)


def test_an_input_that_a_later_batch_lacks_is_looked_for_anew(told: list[str]) -> None:
    def loader() -> Any:
        return CombinedLoader({"a": points(1), "b": points(3)}, "max_size")

    module = Varying()
    train(attacker(), module, loader())
    clean = [batch[0] for batch in points(3)]
    assert [len(module.inputs), *told[1:]] == [
        3,
        "AdversarialTraining perturbs batch['b'][0] in batches without batch['a'][0].",
    ]
    moves = [seen - x for seen, x in zip(module.inputs[1:], clean[1:], strict=True)]
    for move in moves:
        torch.testing.assert_close(move, torch.tensor([[0.25, -0.25]]).expand(4, 2))
    told.clear()
    evaluate(module, loader())
    assert told[1:] == ["AdversarialEvaluation perturbs batch['b'][0] in batches without batch['a'][0]."]


class Whatever(Varying):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.weight.sum() if "n" in batch else super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("key", "error", "said"),
    [
        (
            None,
            TypeError,
            r" perturbs batch\['x'\], but a later batch has no floating-point tensor there.*Set input_key",
        ),
        ("x", ValueError, r": input_key='x' is not in the batch; available there: 'n'\."),
    ],
)
def test_a_later_batch_without_any_input(key: Any, error: Any, said: str) -> None:
    batches = as_batches([{"x": FLOATS}, {"n": torch.ones(4)}])
    with pytest.raises(error, match="AdversarialTraining" + said):
        train(attacker(input_key=key), Whatever(), batches)
    with pytest.raises(error, match="AdversarialEvaluation" + said):
        evaluate(Whatever(), batches, input_key=key)


# What is said.


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
@pytest.mark.parametrize("stage", ["validation", "test"])
def test_evaluation_refuses_loops_that_fetch_their_batches(stage: str) -> None:
    class Fetching(Linear):
        def validation_step(self, dataloader_iter: Any) -> None:
            pass

        def test_step(self, dataloader_iter: Any) -> None:
            pass

    trainer = make_trainer(callbacks=[AdversarialEvaluation()])
    run = trainer.validate if stage == "validation" else trainer.test
    with pytest.raises(
        ValueError, match=rf"AdversarialEvaluation needs the batch, but {stage}_step\(dataloader_iter\)"
    ):
        run(Fetching(), points(), verbose=False)


class Losing(Linear):
    """Computes two losses in validation, and returns none."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise KeyError("nothing")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        scores = batch[0] @ self.weight
        F.mse_loss(scores, torch.zeros(len(scores)))
        F.l1_loss(scores, torch.ones(len(scores)))


@pytest.mark.parametrize(
    ("which", "said"),
    [
        (None, r"shows none \(The step has 2 losses, so it is not clear which one to use: 0: mse_loss, 1: l1_loss\);"),
        (5, r"shows none \(loss_index=5 is out of range: the step has 2 losses: 0: mse_loss, 1: l1_loss\);"),
    ],
)
def test_which_of_several_losses_is_asked_for(which: Any, said: str) -> None:
    with pytest.raises(RuntimeError, match=rf"{said}.*several losses, set loss_index=0 to use the first\.$") as error:
        evaluate(Losing(), points(), loss_index=which)
    assert "score_fn" not in str(error.value)


class Judged(pl.LightningModule):
    """A classifier; ``fail`` is called in eval mode, where a check of accuracies runs it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.net, self.way = nn.Linear(2, 2), way

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x = batch[0]
        if not self.training and self.way == "error":
            raise ValueError("the step is broken")
        if not self.training and self.way == "skips":
            return None
        if not self.training and self.way == "detached":
            x = x.detach()
        logits = self.net(x)
        if self.way == "regression":
            return F.mse_loss(logits, torch.zeros_like(logits))
        return F.cross_entropy(logits, torch.ones(len(x), dtype=torch.long))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("way", "why"),
    [
        ("regression", "needs "),
        ("skips", "The step returns no loss."),
        ("detached", "The loss does not depend on the inputs"),
    ],
)
def test_accuracies_that_are_not_known_are_told_once(way: str, why: str, told: list[str]) -> None:
    trainer = train(attacker(check_every_n_epochs=1), Judged(way), points(), max_epochs=3)
    reasons = [
        each for each in told if each.startswith("AdversarialTraining skips the accuracies of check_every_n_epochs: ")
    ]
    assert len(reasons) == 1
    assert why in reasons[0]
    assert not [key for key in trainer.callback_metrics if "accuracy" in key]


def test_errors_in_the_check_pass_on() -> None:
    with pytest.raises(ValueError, match="the step is broken"):
        train(attacker(check_every_n_epochs=1), Judged("error"), points())


# A learning rate without anything to observe.


@pytest.mark.parametrize(
    ("accuracy", "arguments", "settings", "why"),
    [
        (0.5, {"check_val_every_n_epoch": 9}, {}, "No validation ran. Check check_val_every_n_epoch"),
        (float("nan"), {}, {}, "All values were non-finite"),
        (0.5, {"check_val_every_n_epoch": 9}, {"interval": "epoch"}, "It was never logged"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*non-finite values are ignored")
def test_a_run_in_which_nothing_was_observed(accuracy: float, arguments: Any, settings: Any, why: str) -> None:
    with pytest.warns(UserWarning, match=f"AccuracyGradientLR never received a finite value of 'val_acc', so .*{why}"):
        train_dictated([AccuracyGradientLR(**settings)], Dictated([accuracy]), max_epochs=2, **arguments)


def test_a_cut_is_told_with_its_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_grad.callbacks.schedules import accuracy_gradient_lr

    told: list[str] = []
    monkeypatch.setattr(accuracy_gradient_lr, "rank_zero_info", told.append)
    callback = AccuracyGradientLR(window=1, cooldown=9, factor=0.5)
    train_dictated([callback], max_epochs=8, check_val_every_n_epoch=2)
    assert [each.partition(":")[0] for each in told] == [
        "AccuracyGradientLR cuts the learning rate from 0.1 to 0.05 after observation 3 (epoch 6)"
    ]


class Derived(torch.optim.lr_scheduler.LRScheduler):
    """Computes rates from a base of its own."""

    def __init__(self, optimizer: Any) -> None:
        self.own = [group["lr"] for group in optimizer.param_groups]
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        return list(self.own)


def test_schedulers_derived_from_torchs_are_warned_of() -> None:
    def configure(parameters: Any) -> Any:
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        return [optimizer], [Derived(optimizer)]

    with pytest.warns(
        UserWarning, match="AccuracyGradientLR: Derived is not a scheduler of torch, and may undo the cuts"
    ):
        train_dictated([AccuracyGradientLR()], Dictated(configure=configure), max_epochs=1)
