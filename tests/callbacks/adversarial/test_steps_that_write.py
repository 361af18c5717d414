"""A step that writes into its batch does on attacked inputs what the same step does that writes nowhere."""

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_grad.callbacks import AdversarialEvaluation, AdversarialTraining
from lightning_grad.testing import assert_identical, make_trainer, state_of
from tests.callbacks.adversarial.attacked import as_batches, points
from tests.callbacks.adversarial.test_adversarial_composition import OPTIMIZERS, Evaluated

CLASSES, WIDTH, SIZE = 3, 4, 8


@dataclass
class Record:
    x: Tensor
    y: Tensor


Pair = namedtuple("Pair", "x y")

FORMS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], tuple[Tensor, Tensor]]]] = {
    "list": (lambda x, y: [x, y], lambda batch: (batch[0], batch[1])),
    "nested": (lambda x, y: {"a": [{"x": x}], "b": (y,)}, lambda batch: (batch["a"][0]["x"], batch["b"][0])),
    "dataclass": (Record, lambda batch: (batch.x, batch.y)),
    "named tuple": (Pair, lambda batch: (batch.x, batch.y)),
    "popped": (lambda x, y: {"x": x, "y": y}, lambda batch: (batch.pop("x"), batch.pop("y"))),
    "list of samples": (lambda x, y: [list(x.unsqueeze(1)), y], lambda batch: (batch[0], batch[1])),
}


def _without_graph(x: Tensor) -> None:
    with torch.no_grad():
        x.copy_((x - 0.7) * 2)


WAYS: dict[str, Callable[[Tensor], Any]] = {
    "nowhere": lambda x: (x - 0.7) * 2,
    "in place": lambda x: x.sub_(0.7).mul_(2),
    "by position": lambda x: x.__setitem__(slice(None), (x - 0.7) * 2),
    "without a graph": _without_graph,
    "behind detach": lambda x: x.detach().sub_(0.7).mul_(2),
}


class Normalises(pl.LightningModule):
    """Normalises its inputs and counts its labels from another number, and writes both back or not."""

    def __init__(self, form: str = "list", way: str = "in place", in_hook: bool = False) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.net = nn.Linear(WIDTH, CLASSES)
        self.read, self.change, self.writes, self.in_hook = FORMS[form][1], WAYS[way], way != "nowhere", in_hook

    def normalised(self, batch: Any) -> tuple[Any, Tensor]:
        x, y = self.read(batch)
        several = x if isinstance(x, list) else [x]
        changed = [self.change(each) for each in several]
        changed = several if self.writes else changed
        y = y.add_(1).remainder_(CLASSES) if self.writes else (y + 1) % CLASSES
        return (torch.cat(changed) if isinstance(x, list) else changed[0]), y

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = self.normalised(batch)
        return F.cross_entropy(self.net(x), y)

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if self.in_hook:
            self.normalised(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = self.read(batch) if self.in_hook else self.normalised(batch)
        loss = F.cross_entropy(self.net(x), y)
        self.log("val_loss", loss, batch_size=SIZE)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def batches(form: str, seed: int = 0) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, SIZE, WIDTH, generator=generator)
    y = torch.randint(CLASSES, (3, SIZE), generator=generator)
    return [FORMS[form][0](*pair) for pair in zip(x, y, strict=True)]


def evaluations(count: int = 1, **settings: Any) -> list[AdversarialEvaluation]:
    settings = {"epsilon": 0.2, "steps": 2, **settings}
    return [AdversarialEvaluation(**settings, name=str(number)) for number in range(count)]


def validated(module: Normalises, form: str, callbacks: list[Any], **arguments: Any) -> dict[str, Tensor]:
    trainer = make_trainer(callbacks=callbacks, **arguments)
    trainer.validate(module, as_batches(batches(form)), verbose=False)
    return dict(trainer.callback_metrics)


SETTINGS: dict[str, dict[str, Any]] = {
    "one": {},
    "restarts": {"restarts": 3},
    "steps": {"steps": 9},
    "none": {"epsilon": 0.0},
    "two": {"count": 2, "restarts": 2},
    "three": {"count": 3},
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(
    ("form", "way"), [*((form, "in place") for form in FORMS), *(("list", way) for way in WAYS if way != "nowhere")]
)
def test_evaluations(form: str, way: str, settings: str) -> None:
    chosen = dict(SETTINGS[settings])
    count = chosen.pop("count", 1)

    found = validated(Normalises(form, way), form, evaluations(count, **chosen))
    expected = validated(Normalises(form, "nowhere"), form, evaluations(count, **chosen))
    assert len(found) == 1 + count
    assert_identical(found, expected)
    assert_identical(found["val_loss"], validated(Normalises(form, "nowhere"), form, [])["val_loss"])


@pytest.mark.parametrize("count", [1, 2])
def test_a_hook_that_writes_before_the_step(count: int) -> None:
    found = validated(Normalises(in_hook=True), "list", evaluations(count, epsilon=1e-7))
    clean = validated(Normalises(way="nowhere"), "list", [])["val_loss"]
    assert torch.equal(found["val_loss"], clean), "the clean validation is that without the callback"
    for number in range(count):
        assert found[f"adversarial/{number}/val_loss"] == pytest.approx(float(clean), abs=1e-5)


class Shown(Normalises):
    """Shows a loss in training only, and takes its labels out of the batch."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = self.normalised(batch)
        self.log("val_loss", (self.net(x).argmax(1) != y).float().mean(), batch_size=SIZE)


def test_the_step_that_has_no_loss_spoils_nothing_for_the_one_that_has() -> None:
    for restarts in (1, 2):
        found = [
            validated(Shown("popped", way), "popped", evaluations(restarts=restarts)) for way in ("in place", "nowhere")
        ]
        assert_identical(*found)
        assert found[0]["adversarial/0/val_loss"] > found[0]["val_loss"]


@pytest.mark.parametrize(
    "settings",
    [{}, {"attack": "pgd", "steps": 3}, {"clean_fraction": 0.5}, {"norm": "l2"}],
    ids=["fgsm", "pgd", "clean", "l2"],
)
@pytest.mark.parametrize("form", FORMS)
def test_training(form: str, settings: dict[str, Any]) -> None:
    left = []
    for way in ("in place", "nowhere"):
        module = Normalises(form, way)
        trainer = make_trainer(callbacks=[AdversarialTraining(0.2, **settings)], max_epochs=1)
        trainer.fit(module, as_batches(batches(form)))
        left.append([state_of(trainer, module), dict(trainer.callback_metrics)])
    assert_identical(*left)
    assert "adversarial/pgd_accuracy" in left[0][1]


class WritesAgain(Evaluated):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.real((batch_idx, batch[0].detach().clone()))
        return self.net(batch[0].mul_(3).sub_(0.5)).square().mean()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_closures_that_are_evaluated_again_see_the_same_inputs(name: str) -> None:
    make, times = OPTIMIZERS[name]
    module = WritesAgain(make)
    trainer = make_trainer(callbacks=[AdversarialTraining(0.25, check_every_n_epochs=None)], max_epochs=1)
    trainer.fit(module, points(2))
    for i in range(2):
        # The first is that of the attack.
        inputs = [x for batch_idx, x in module.real.seen if batch_idx == i][1:]
        assert len(inputs) >= times
        assert all(torch.equal(x, inputs[0]) for x in inputs)


class Words(pl.LightningModule):
    """What follows its embedding works in place, or does not."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.words, self.net, self.in_place = nn.Embedding(5, WIDTH), nn.Linear(WIDTH, CLASSES), in_place

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        found = self.words(batch[0])
        found = found.mul_(3).add_(1) if self.in_place else found * 3 + 1
        return F.cross_entropy(self.net(found.mean(1)), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.training_step(batch, batch_idx)
        self.log("val_loss", loss, batch_size=SIZE)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_layers_behind_an_embedding_that_work_in_place() -> None:
    tokens = torch.randint(5, (2, SIZE, 3), generator=torch.Generator().manual_seed(0))
    data = [[each, each[:, 0] % CLASSES] for each in tokens]
    left = []
    for in_place in (True, False):
        module = Words(in_place)
        callbacks = [AdversarialTraining(0.2, check_every_n_epochs=None), *evaluations(2, restarts=2)]
        trainer = make_trainer(callbacks=callbacks, max_epochs=2)
        trainer.fit(module, as_batches(data), as_batches(data))
        left.append({"weights": dict(module.state_dict()), "metrics": dict(trainer.callback_metrics)})
    for one, other in zip(*(list(each["weights"].values()) for each in left), strict=True):
        torch.testing.assert_close(one, other)
    for key, value in left[0]["metrics"].items():
        assert value == pytest.approx(float(left[1]["metrics"][key]), abs=1e-5), key
