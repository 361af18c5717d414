"""What a module logs in validation, once more on attacked inputs; of the validation itself nothing is moved."""

import copy
import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassPrecision, MulticlassRecall

from lightning_grad.callbacks import AdversarialEvaluation
from lightning_grad.callbacks.adversarial._attack import generator_for
from lightning_grad.functional import pgd
from lightning_grad.testing import assert_identical, make_trainer, state_of
from tests.callbacks.adversarial.attacked import CLASSES, INPUTS, At, as_batches, samples

EPSILON, SIZE = 0.3, 8


class Net(pl.LightningModule):
    """Logs tensors. Others derive from it, and log otherwise."""

    def __init__(self) -> None:
        super().__init__()
        pl.seed_everything(3, verbose=False)
        self.net = nn.Sequential(
            nn.Linear(INPUTS, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, CLASSES)
        )
        self.train_loss = MeanMetric()
        self.build()

    def build(self) -> None:
        pass

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", self.train_loss(loss), on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self.net(batch[0])
        self.log("val_loss", F.cross_entropy(logits, batch[1]), prog_bar=True)
        self.log("val_acc", share_of_right(logits, batch[1]), on_step=True, on_epoch=True, sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> Any:
        self.validation_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.02)


def share_of_right(logits: Tensor, y: Tensor) -> Tensor:
    return (logits.argmax(1) == y).float().mean()


def loader(count: int = 21) -> DataLoader[Any]:
    """Return batches, the last of which is smaller."""
    return DataLoader(samples(count), SIZE)


def evaluator(epsilon: float = EPSILON, **arguments: Any) -> AdversarialEvaluation:
    return AdversarialEvaluation(epsilon, **{"steps": 3, **arguments})


def attack(module: Any, loaders: Any, epsilon: float = EPSILON, steps: int = 3) -> list[Any]:
    """Attack all batches with the maths alone."""
    net, attacked = copy.deepcopy(module.net).eval(), []
    for number, batches in enumerate(loaders):
        attacked.append([])
        for i, batch in enumerate(batches):
            keys = list(batch) if isinstance(batch, dict) else [0, 1]
            x, y = (batch[key] for key in keys)
            generator = generator_for(x.device, 0, f"{number}/{i}/0/0")
            moved = pgd(lambda x, y=y: F.cross_entropy(net(x), y), x, epsilon, steps, generator=generator)
            attacked[-1].append({keys[0]: moved, keys[1]: y} if isinstance(batch, dict) else [moved, y])
    return [as_batches(batches) for batches in attacked]


def validate(callbacks: Any, module: Any, loaders: Any = None, **arguments: Any) -> dict[str, Tensor]:
    """Return the metrics of a validation."""
    trainer = make_trainer(callbacks=callbacks, **arguments)
    trainer.validate(module, loader() if loaders is None else loaders, verbose=False)
    return dict(trainer.callback_metrics)


def fit(callbacks: Any, module: Any, loaders: Any = None, ckpt: Any = None, **arguments: Any) -> pl.Trainer:
    pl.seed_everything(5, verbose=False)
    if any(isinstance(callback, pl.callbacks.Checkpoint) for callback in callbacks):
        arguments.setdefault("enable_checkpointing", True)
    trainer = make_trainer(callbacks=callbacks, **{"max_epochs": 2, **arguments})
    trainer.fit(module, DataLoader(samples(48), SIZE), loader() if loaders is None else loaders, ckpt_path=ckpt)
    return trainer


def parted(metrics: dict[str, Tensor], prefix: str = "adversarial/") -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the module's own metrics and those that are logged on attacked inputs, by the same names."""
    attacked = {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}
    return {key: value for key, value in metrics.items() if not key.startswith("adversarial/")}, attacked


# Ways of logging.


class LogsMetrics(Net):
    def build(self) -> None:
        self.acc = MulticlassAccuracy(CLASSES, average="micro")
        self.collection = MetricCollection([MulticlassPrecision(CLASSES), MulticlassRecall(CLASSES)], prefix="val_")
        self.mean = MeanMetric()

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        logits = self.net(x)
        loss = F.cross_entropy(logits, y)
        self.acc(logits, y)
        self.collection.update(logits, y)
        self.mean(loss, len(y))
        self.log("val_acc", self.acc, on_step=True, on_epoch=True, prog_bar=True)
        self.log("val_loss", self.mean, on_step=False, on_epoch=True)
        self.log_dict(self.collection, on_step=False, on_epoch=True, sync_dist=True)
        return {"loss": loss}


class ComputesAtTheEnd(LogsMetrics):
    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self.net(batch[0])
        self.acc.update(logits, batch[1])
        self.collection.update(logits, batch[1])
        return F.cross_entropy(logits, batch[1])

    def on_validation_epoch_end(self) -> None:
        self.log("val_acc", self.acc.compute())
        self.log_dict(self.collection.compute())
        self.acc.reset()
        self.collection.reset()


class ListsCleared(Net):
    def build(self) -> None:
        self.outputs: list[Any] = []
        self.by_name: dict[str, list[Any]] = {"y": []}

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self.net(batch[0])
        self.outputs.append(logits)
        self.by_name["y"].append(batch[1])
        return logits, F.cross_entropy(logits, batch[1])  # no loss to Lightning, and none to the attack

    def on_validation_epoch_end(self) -> None:
        logits, y = torch.cat(self.outputs), torch.cat(self.by_name["y"])
        self.log_dict(
            {"val_acc": share_of_right(logits, y), "val_loss": F.cross_entropy(logits, y), "n": float(len(y))}
        )
        self.outputs.clear()
        self.by_name["y"].clear()


class ListsMadeAtTheStart(ListsCleared):
    """Makes all anew in each epoch, and nothing before."""

    def build(self) -> None:
        pass

    def on_validation_epoch_start(self) -> None:
        self.outputs, self.by_name = [], {"y": []}
        self.acc = MulticlassAccuracy(CLASSES)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        output = super().validation_step(batch, batch_idx)
        self.acc.update(output[0], batch[1])
        return {"logits": output[0]}

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self.log("other_acc", self.acc.compute())


class Meter:
    def __init__(self) -> None:
        self.sum, self.count = 0.0, 0

    def add(self, value: float, count: int) -> None:
        self.sum, self.count = self.sum + value * count, self.count + count


class Counts(Net):
    def build(self) -> None:
        self.register_buffer("in_place", torch.zeros(1))
        self.register_buffer("anew", torch.zeros(1))
        self.register_buffer("bank", torch.zeros(0, CLASSES), persistent=False)

    def on_validation_start(self) -> None:
        self.right, self.tensor, self.other = 0, torch.zeros(1), torch.zeros(1)
        self.meter, self.listed, self.named = Meter(), [MeanMetric()], {"acc": MulticlassAccuracy(CLASSES)}

    def on_validation_epoch_start(self) -> None:
        self.in_place.zero_()
        self.anew, self.bank = torch.zeros(1), torch.zeros(0, CLASSES)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self.net(batch[0])
        right = (logits.argmax(1) == batch[1]).sum()
        loss = F.cross_entropy(logits, batch[1])
        self.right += int(right)
        self.tensor += right
        self.other = self.other + right
        self.in_place += right
        self.anew = self.anew + right
        self.bank = torch.cat([self.bank, logits])
        self.meter.add(loss.item(), len(logits))
        self.listed[0].update(loss)
        self.named["acc"].update(logits, batch[1])

    def on_validation_epoch_end(self) -> None:
        counts = {"right": self.right, "tensor": self.tensor, "other": self.other, "in_place": self.in_place.clone()}
        counts |= {"anew": self.anew, "rows": len(self.bank), "bank": self.bank.sum(), "meter": self.meter.sum}
        counts |= {"count": self.meter.count, "listed": self.listed[0].compute(), "named": self.named["acc"].compute()}
        self.log_dict({name: torch.as_tensor(value).float() for name, value in counts.items()})


class AroundBatches(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert self.trainer.training, "the validation step has a loss of its own"
        return super().training_step(batch, batch_idx)

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.current = batch_idx

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        assert self.current == batch_idx
        logits = self.net(batch[0])
        return {"loss": F.cross_entropy(logits, batch[1]), "logits": logits}

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        assert torch.equal(self.net(batch[0]), outputs["logits"])
        self.log("val_acc", share_of_right(outputs["logits"], batch[1]), batch_size=len(batch[1]))
        self.log("x", batch[0].norm(), on_step=True, on_epoch=True)


class SeveralLoaders(Net):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        x, y = (batch["image"], batch["label"]) if isinstance(batch, dict) else batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("val_loss", loss)
        self.log(f"own_{dataloader_idx}", x.norm(), add_dataloader_idx=False)
        return loss


WAYS = [Net, LogsMetrics, ComputesAtTheEnd, ListsCleared, ListsMadeAtTheStart, Counts, AroundBatches, SeveralLoaders]


def loaders_of(way: Any) -> list[Any]:
    other = as_batches([{"image": 0.5 * x, "label": y} for x, y in loader(12)])
    return [loader(), other] if way is SeveralLoaders else [loader()]


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_what_is_logged_is_what_a_validation_on_attacked_batches_logs(way: Any, inference: bool) -> None:
    loaders = loaders_of(way)
    plain, module, replayed = way(), way(), way()
    expected_clean = validate([], plain, loaders, inference_mode=inference)
    found = validate([evaluator()], module, loaders, inference_mode=inference)
    expected = validate([], replayed, attack(plain, loaders), inference_mode=inference)
    clean, adversarial = parted(found)
    assert_identical(clean, expected_clean)
    assert_identical(adversarial, expected)
    assert adversarial != clean
    assert_identical(dict(module.state_dict()), dict(plain.state_dict()))
    assert vars(module).keys() == vars(plain).keys()


@pytest.mark.parametrize("way", WAYS)
def test_the_fit_is_bitwise_untouched(way: Any) -> None:
    loaders = loaders_of(way)
    plain, module, replayed = way(), way(), way()
    runs, left = [], []
    for each, callbacks in ((plain, []), (module, [evaluator()])):
        runs.append(fit(callbacks, each, loaders))
        left.append(state_of(runs[-1], each))
    assert_identical(*left)
    clean, adversarial = parted(dict(runs[1].callback_metrics))
    assert_identical(clean, dict(runs[0].callback_metrics))
    replayed.load_state_dict(plain.state_dict())
    expected = validate([], replayed, attack(plain, loaders))
    assert_identical(adversarial, expected)


class Draws(LogsMetrics):
    """Drops out and draws in validation, from streams of all kinds, and remembers what it logs."""

    def build(self) -> None:
        super().build()
        self.generator, self.calls, self.random = torch.Generator(), [], random.Random(1)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("drawn", torch.rand(()) + random.random() + np.random.rand() + self.random.random())
        self.log("own", torch.rand((), generator=self.generator))
        return super().validation_step([F.dropout(batch[0]), batch[1]], batch_idx)

    def log(self, name: str, *args: Any, **kwargs: Any) -> None:
        self.calls.append(name)
        super().log(name, *args, **kwargs)


def test_a_validation_that_draws_draws_the_same(tmp_path: Path) -> None:
    left = []
    for folder, callbacks in (("plain", []), ("attacked", [evaluator()])):
        module, seen = Draws(), []
        seen_by = At(on_validation_end=lambda t, m, seen=seen: seen.append(dict(t.callback_metrics)))
        trainer = fit([*callbacks, seen_by], module, logger=CSVLogger(tmp_path / folder, name="", version=""))
        metrics = [parted(each)[0] for each in seen]
        streams = [random.getstate(), np.random.get_state()[1].tolist(), module.generator.get_state()]
        left.append([state_of(trainer, module), metrics, streams, module.calls, len(seen)])
    assert_identical(*left)
    assert left[0][4] == 3


# What is attacked, worked by hand.


class Hand(pl.LightningModule):
    """Scores x @ (3, -4), and is right where that is above zero."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([3.0, -4.0]))

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        score = batch[0] @ self.weight
        self.log("val_acc", (score > 0).float().mean())
        self.log("val_score", score.mean())
        return -score.mean()


def test_by_hand() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, -1.0], [0.2, 0.0], [0.5, 0.0], [-1.0, 0.0]])
    batches = DataLoader(torch.utils.data.TensorDataset(x), 3)
    expected = {
        0.0: (0.8, 3.0),
        0.1: (0.6, 2.3),
        0.3: (0.4, 0.9),
        1.0: (0.0, -4.0),
    }  # scores 3, 4, .6, 1.5, -3; -7 epsilon
    for epsilon, (accuracy, _) in expected.items():
        one = AdversarialEvaluation(epsilon, steps=1, random_start=False)
        clean, attacked = parted(validate([one], Hand(), batches))
        assert clean["val_score"] == pytest.approx(6.1 / 5)
        assert attacked["val_score"] == pytest.approx(6.1 / 5 - 7 * epsilon, abs=1e-6)
        assert attacked["val_acc"] == pytest.approx(accuracy)
    # In l2, along the weight; in pixels, where an input is (pixel - 0.5) / 0.5; within the bounds of what a pixel can be.
    for arguments, score in (
        ({"norm": "l2"}, 6.1 / 5 - 0.5),
        ({"mean": 0.5, "std": [0.5]}, 6.1 / 5 - 1.4),
        ({"bounds": [-1, 1]}, 6.1 / 5 - 0.7 + 0.3 / 5),
    ):
        one = AdversarialEvaluation(0.1, steps=1, random_start=False, **arguments)
        assert parted(validate([one], Hand(), batches))[1]["val_score"] == pytest.approx(score, abs=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_epsilon_zero_is_the_clean_validation(way: Any) -> None:
    clean, attacked = parted(validate([evaluator(0.0)], way(), loaders_of(way)))
    assert_identical(attacked, clean)


def test_a_large_epsilon_leaves_nothing() -> None:
    attacked = [parted(validate([evaluator(epsilon, steps=9)], Net()))[1]["val_acc"] for epsilon in (0.01, 0.3, 9.0)]
    assert attacked[0] > attacked[1] > attacked[2] == 0


# Whose loss.


class Losses(Net):
    """Its validation step shows losses in one way of several."""

    def __init__(self, way: str, trains: bool = True) -> None:
        super().__init__()
        self.way, self.trains = way, trains

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if not self.trains:
            raise KeyError("mixed")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        logits = self.net(x)
        self.log("val_acc", share_of_right(logits, y))
        if self.way == "hand-written":
            return -logits.log_softmax(1)[torch.arange(len(y)), y].mean()
        if self.way == "two":
            F.mse_loss(logits.mean(1), torch.zeros(len(y)))
        if self.way in ("one", "two", "logits"):
            F.cross_entropy(logits, y)
        if self.way == "numpy":
            logits.numpy()  # which only a tensor without a graph allows
        if self.way == "no graph":
            F.cross_entropy(logits.detach(), y)
        return logits if self.way in ("logits", "none") else None


@pytest.mark.parametrize(
    ("way", "which"),
    [
        ("hand-written", None),
        ("one", None),
        ("one", 0),
        ("two", 1),
        ("logits", None),
        ("none", None),
        ("no graph", None),
        ("numpy", None),
    ],
)
def test_losses_are_found(way: str, which: Any) -> None:
    found = []
    for each in (Losses(way), Losses("one")):
        callback = evaluator(loss_index=which if each.way == way else None)
        found.append(parted(validate([callback], each, inference_mode=way != "one"))[1]["val_acc"])
    clean = validate([], Losses(way))["val_acc"]
    assert found[0] == found[1] < clean


def test_another_loss_is_another_attack() -> None:
    found = [parted(validate([evaluator(loss_index=which)], Losses("two")))[1]["val_acc"] for which in (0, 1)]
    assert found[0] > found[1]


class Untrained(Hand):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        batch[0].sum()


@pytest.mark.parametrize(
    ("module", "arguments", "said"),
    [
        (
            Losses("none", trains=False),
            {},
            r"needs a loss to maximize, but validation_step shows none; training_step fails.*KeyError",
        ),
        (Untrained(), {}, r"needs a loss to maximize, but validation_step shows none\. Compute it in validation_step"),
        (Losses("hand-written"), {"restarts": 2, "loss_index": 3}, r"loss of each sample for several restarts"),
        (Losses("one"), {"loss_index": 3}, r"needs a loss to maximize, but validation_step shows none"),
    ],
)
def test_without_a_loss(module: Any, arguments: Any, said: str) -> None:
    with pytest.raises(RuntimeError, match=rf"^AdversarialEvaluation.*{said}"):
        validate([evaluator(**arguments)], module)


def test_restarts_show_of_each_sample_the_worst() -> None:
    class Each(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            super().validation_step(batch, batch_idx)
            self.losses = [
                *getattr(self, "losses", []),
                F.cross_entropy(self.net(batch[0]), batch[1], reduction="none"),
            ]

        def on_validation_epoch_end(self) -> None:
            self.log_dict({f"loss_{i}": loss for i, loss in enumerate(torch.cat(self.losses))})

    weak = {"steps": 1, "step_size": 0.01}
    module = Each()
    y = torch.cat([y for _, y in loader()])
    attempts = []
    for restart in range(3):
        moved = [
            pgd(
                lambda x, y=y: F.cross_entropy(module.eval().net(x), y),
                x,
                2.0,
                1,
                0.01,
                generator=generator_for(x.device, 0, f"0/{i}/0/{restart}"),
            )
            for i, (x, y) in enumerate(loader())
        ]
        attempts.append(F.cross_entropy(module.net(torch.cat(moved)), y, reduction="none").detach())
    found = {n: parted(validate([evaluator(2.0, restarts=n, **weak)], Each()))[1] for n in (1, 3)}
    for n in (1, 3):
        expected = torch.stack(attempts[:n]).amax(0)
        torch.testing.assert_close(torch.stack([found[n][f"loss_{i}"] for i in range(len(y))]), expected)
    assert found[3]["val_acc"] <= found[1]["val_acc"]
    assert (torch.stack(attempts).argmax(0) > 0).any()
