"""Steps as people write them: they pop labels, change their batch, draw pictures, keep meters, write into the log folder."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics import SumMetric

from lightning_grad.callbacks import AdversarialEvaluation, AdversarialTraining
from lightning_grad.testing import make_trainer

BATCH, BATCHES, EPSILON = 8, 3, 0.2


class Samples(torch.utils.data.Dataset):
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(BATCH * BATCHES, 6, generator=generator)
        self.tokens = self.x[:, :4].gt(0).long()
        self.labels = self.x.argmax(1) % 3

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixels": self.x[index], "tokens": self.tokens[index], "labels": self.labels[index]}


class Project(pl.LightningModule):
    """Steps on dict batches; subclasses do what people do in them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(6, 3)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(self.net(batch["pixels"]), batch["labels"])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(make: Any, *callbacks: pl.Callback, **arguments: Any) -> tuple[dict[str, float], pl.LightningModule]:
    pl.seed_everything(0, verbose=False)
    module = make()
    trainer = make_trainer(callbacks=list(callbacks), **{"max_epochs": 1, **arguments})
    trainer.fit(module, DataLoader(Samples(), BATCH), DataLoader(Samples(), BATCH))
    return {key: float(value) for key, value in trainer.callback_metrics.items()}, module


def both(**arguments: Any) -> list[pl.Callback]:
    key = {"input_key": "pixels", **arguments}
    return [AdversarialTraining(EPSILON, **key), AdversarialEvaluation(EPSILON, steps=2, **key)]


def assert_attacked_and_clean_as_ever(make: Any, **arguments: Any) -> dict[str, float]:
    """Both callbacks work, and an evaluation leaves clean metrics and weights bitwise as they are."""
    plain, weights = run(make)
    seen, same = run(make, both(**arguments)[1])
    for key, value in plain.items():
        assert seen[key] == value, key
    assert all(torch.equal(a, b) for a, b in zip(weights.parameters(), same.parameters(), strict=True))
    trained, _ = run(make, *both(**arguments))
    assert trained["adversarial/val_loss"] > trained["val_loss"]
    return seen


class Pops(Project):
    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        labels = batch.pop("labels")
        return F.cross_entropy(self.net(batch.pop("pixels")), labels)


def test_a_step_that_pops_labels() -> None:
    seen = assert_attacked_and_clean_as_ever(Pops)
    assert seen["adversarial/val_loss"] > seen["val_loss"]


class PopsTokens(Pops):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(2, 6)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        labels = batch.pop("labels")
        return F.cross_entropy(self.net(self.embedding(batch.pop("tokens")).mean(1)), labels)


def test_a_step_that_pops_tokens() -> None:
    assert_attacked_and_clean_as_ever(PopsTokens, input_key="embedding")


class InPlace(Project):
    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        batch["pixels"].sub_(0.5)
        batch["labels"].add_(1).remainder_(3)
        return super().loss(batch)


def test_a_step_that_changes_its_batch_in_place() -> None:
    seen = assert_attacked_and_clean_as_ever(InPlace)
    hardest = EPSILON * 6  # by which a linear loss can rise is bounded: labels that are shifted twice would exceed it
    assert 0 < seen["adversarial/val_loss"] - seen["val_loss"] < hardest


class Draws(Project):
    """Draws the first sample of the last validation batch, and of each in training."""

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return super().loss(batch)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        if batch_idx in self.drawn:
            batch["pixels"][0].numpy()
        super().validation_step(batch, batch_idx)


@pytest.mark.parametrize("drawn", [{0}, {BATCHES - 1}, set(range(BATCHES))])
def test_a_validation_that_draws_a_sample(drawn: set[int]) -> None:
    seen, _ = run(type("Drawing", (Draws,), {"drawn": drawn}), both()[1])
    expected, _ = run(Project, both()[1])
    assert seen["adversarial/val_loss"] == pytest.approx(expected["adversarial/val_loss"], abs=1e-6)


class DrawsInTraining(Project):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        batch["pixels"][0].numpy()
        return super().training_step(batch, batch_idx)


def test_a_training_step_that_draws_is_told_who_asks() -> None:
    with pytest.raises(RuntimeError, match="numpy") as raised:
        run(DrawsInTraining, both()[0])
    assert any("AdversarialTraining ran training_step" in note for note in raised.value.__notes__)


class Plain:
    def __init__(self) -> None:
        self.count = 0

    def update(self) -> None:
        self.count += 1


class OnDevice(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.device, self.folder, self.average = torch.device("cpu"), Path(), SumMetric()


class Counting(Plain):
    def __call__(self) -> None:
        self.update()


class Slots:
    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0

    def update(self) -> None:
        self.count += 1


class Summed:
    """A torchmetrics metric that no module knows as its child."""

    def __init__(self, hold: Any) -> None:
        self.held = hold(SumMetric())

    def update(self) -> None:
        self._metric().update(1.0)

    def _metric(self) -> SumMetric:
        found = self.held
        return found[0] if isinstance(found, list) else found["a"] if isinstance(found, dict) else found.a

    @property
    def count(self) -> float:
        return float(self._metric().compute())


METERS = {
    "plain": Plain,
    "device": OnDevice,
    "callable": Counting,
    "slots": Slots,
    "list": lambda: Summed(lambda metric: [metric]),
    "dict": lambda: Summed(lambda metric: {"a": metric}),
    "namespace": lambda: Summed(lambda metric: SimpleNamespace(a=metric)),
}


def metered(kind: str) -> Any:
    class Metered(Project):
        def __init__(self) -> None:
            super().__init__()
            self.trained, self.validated = METERS[kind](), METERS[kind]()

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            self.trained.update()
            return super().training_step(batch, batch_idx)

        def on_train_epoch_end(self) -> None:
            self.log("trained", float(self.trained.count))

        def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
            self.validated.update()
            super().validation_step(batch, batch_idx)

        def on_validation_epoch_end(self) -> None:
            self.log("validated", float(self.validated.count))

    return Metered


@pytest.mark.parametrize("kind", METERS)
@pytest.mark.parametrize("attacks", [[1], [0], [0, 1]], ids=["evaluation", "training", "both"])
def test_meters_count_real_steps_only(kind: str, attacks: list[int]) -> None:
    seen, _ = run(metered(kind), *(both()[index] for index in attacks), num_sanity_val_steps=0)
    assert (seen["trained"], seen["validated"]) == (BATCHES, BATCHES)
    if 1 in attacks:
        assert seen["adversarial/validated"] == BATCHES


class Writes(Project):
    """Writes where its logger says that files go."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        assert os.path.isdir(os.path.join(self.logger.save_dir, ""))
        assert str(self.logger.version) == "0"
        return super().training_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        Path(self.trainer.log_dir).mkdir(parents=True, exist_ok=True)
        with open(os.path.join(self.logger.log_dir, "matrix.txt"), "a") as file:
            file.write("x")
        with self.logger.experiment as nothing:
            assert not list(nothing)


def test_a_logger_says_where_files_go(tmp_path: Path) -> None:
    class Quietly(Writes):
        def on_validation_epoch_end(self) -> None:
            if "_Mute" in type(self.logger).__name__:
                super().on_validation_epoch_end()

    logger = CSVLogger(tmp_path, version=0)
    run(Quietly, *both(), logger=logger, num_sanity_val_steps=0)
    assert (Path(logger.log_dir) / "matrix.txt").read_text() == "x"


class Vocabulary(Project):
    def __init__(self) -> None:
        super().__init__()
        self.words = {str(number): number for number in range(1000)}
        self.seen: dict[str, int] = {}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.words["new"] = self.words.get("new", 0) + 1
        self.seen["count"] = self.seen.get("count", 0) + 1
        return super().training_step(batch, batch_idx)


def test_dictionaries_of_plain_values_are_put_back() -> None:
    _, module = run(Vocabulary, both()[0])
    assert module.words["new"] == module.seen["count"] == BATCHES
