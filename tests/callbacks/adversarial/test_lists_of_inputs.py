"""A batch that is a list: each sample's input is attacked in a ball of its own, whatever its size, or it is said which are."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_grad.callbacks import AdversarialEvaluation, AdversarialTraining
from lightning_grad.callbacks.adversarial import _places
from lightning_grad.functional.torch_version import TORCH
from lightning_grad.testing import make_trainer
from tests.callbacks.adversarial.attacked import Tape, as_batches
from tests.labelled import labelled

EPSILON = 0.25
SIZES = [(3, 4, 5), (3, 6, 4), (3, 4, 5), (3, 5, 5)]


def images(sizes: Any = SIZES, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(size, generator=generator) for size in sizes]


class Weighted(pl.LightningModule):
    """Its loss is linear in each image, with a weight for each pixel, so that the worst change is known."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(3)))
        self.real = Tape()

    def images_of(self, batch: Any) -> list[Tensor]:
        return list(batch[0])

    def loss_of(self, image: Tensor) -> Tensor:
        return (image * self.weight[:, : image.shape[1], : image.shape[2]]).sum()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        found = self.images_of(batch)
        self.real([image.detach().clone() for image in found])
        return torch.stack([self.loss_of(image) for image in found]).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.training_step(batch, batch_idx)
        self.log("val_loss", loss, batch_size=1)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def moves(module: Weighted, clean: list[Tensor], batch: Any, **settings: Any) -> list[Tensor]:
    """Return how the real step's images differ from the clean ones."""
    settings = {"epsilon": EPSILON, "check_every_n_epochs": None, "random_start": False, **settings}
    make_trainer(callbacks=[AdversarialTraining(**settings)], max_epochs=1).fit(module, as_batches([batch]))
    seen = module.real.seen[-1]
    assert [image.shape for image in seen] == [image.shape for image in clean]
    return [image - old for image, old in zip(seen, clean, strict=True)]


def own_weights(module: Weighted, clean: list[Tensor]) -> list[Tensor]:
    return [module.weight.detach()[:, : image.shape[1], : image.shape[2]] for image in clean]


class OfDicts(Weighted):
    def images_of(self, batch: Any) -> list[Tensor]:
        return [sample["image"] for sample in batch]


FORMS = {
    "list": (Weighted, lambda clean: (clean, list(range(len(clean))))),
    "tuple": (Weighted, lambda clean: (tuple(clean), ["a"] * len(clean))),
    "dicts": (OfDicts, lambda clean: [{"image": image, "id": 7} for image in clean]),
}


@pytest.mark.parametrize("sizes", [SIZES, SIZES[:1] * 4, SIZES[:1]], ids=["sizes", "same", "one"])
@pytest.mark.parametrize("form", FORMS)
def test_each_image_moves_as_far_as_it_may(form: str, sizes: Any) -> None:
    make, build = FORMS[form]
    clean = images(sizes)
    if form == "dicts" and len(clean) == 1:
        return
    module = make()
    for move, weight in zip(moves(module, clean, build(clean)), own_weights(module, clean), strict=True):
        torch.testing.assert_close(move, EPSILON * weight.sign())
    for move, weight in zip(moves(module, clean, build(clean), norm="l2"), own_weights(module, clean), strict=True):
        torch.testing.assert_close(move, EPSILON * weight / weight.norm())


def test_each_begins_in_a_ball_of_its_own_size() -> None:
    clean = images([(3, 2, 2), (3, 8, 8)])
    for norm in ("linf", "l2"):
        still = Weighted()
        tiny = moves(still, clean, (clean, [1, 2]), norm=norm, random_start=True, step_size=1e-12)
        for move in tiny:
            size = move.abs().max() if norm == "linf" else move.norm()
            assert 0 < size <= EPSILON * (1 + 1e-5)
            assert (move != 0).all()


def test_bounds_and_units_are_those_of_each_image() -> None:
    mean, std = [0.1, 0.2, 0.3], [0.5, 1.0, 2.0]
    scale = torch.tensor(std).view(3, 1, 1)
    pixels = [1.0 + image for image in images()]  # what fills up small images must not lie outside the bounds
    clean = [(image - torch.tensor(mean).view(3, 1, 1)) / scale for image in pixels]
    module = Weighted()
    found = moves(module, clean, (clean, list(range(4))), bounds=[1.0, 2.0], mean=mean, std=std)
    for move, weight, image in zip(found, own_weights(module, clean), pixels, strict=True):
        expected = (image + EPSILON * (weight * scale).sign()).clamp(1.0, 2.0) - image
        torch.testing.assert_close(move * scale, expected)


def test_images_of_one_size_are_attacked_as_if_they_were_stacked() -> None:
    clean = images(SIZES[:1] * 4)

    class Stacked(Weighted):
        def images_of(self, batch: Any) -> list[Tensor]:
            return list(batch[0].unbind())

    for settings in ({"random_start": True}, {"norm": "l2", "random_start": True}, {"clean_fraction": 0.5}):
        listed, stacked = Weighted(), Stacked()
        one = moves(listed, clean, (clean, [1, 2, 3, 4]), **settings)
        other = moves(stacked, clean, (torch.stack(clean), torch.zeros(4)), **settings)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        if "clean_fraction" in settings:
            assert sum(bool((move == 0).all()) for move in one) == 2


def test_later_batches_may_have_other_numbers_of_images() -> None:
    module, data = Weighted(), [(images(SIZES[:count], count), list(range(count))) for count in (4, 1, 3)]
    callback = AdversarialTraining(EPSILON, check_every_n_epochs=None, random_start=False)
    make_trainer(callbacks=[callback], max_epochs=1).fit(module, as_batches(data))
    real = module.real.seen[1::2]  # each follows the one of its attack
    assert [len(seen) for seen in real] == [4, 1, 3]
    for seen, (clean, _) in zip(real, data, strict=True):
        assert all(
            torch.allclose((image - old).abs(), torch.tensor(EPSILON)) for image, old in zip(seen, clean, strict=True)
        )


class Detects(pl.LightningModule):
    """Classifies each image by a loss that is seen, over images of several sizes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))

    def step(self, batch: Any) -> Tensor:
        found, labels = batch
        logits = torch.cat([self.net(image.unsqueeze(0)) for image in found])
        return F.cross_entropy(logits, torch.tensor(labels))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.step(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.step(batch), batch_size=len(batch[0]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_evaluation_restarts_and_checks_on_lists() -> None:
    data = [(images(seed=seed), [0, 1, 2, 0]) for seed in range(2)]
    losses = []
    for restarts in (1, 4):
        evaluation = AdversarialEvaluation(EPSILON, steps=2, restarts=restarts)
        trainer = make_trainer(callbacks=[evaluation, AdversarialTraining(EPSILON)], max_epochs=1)
        trainer.fit(Detects(), as_batches(data), as_batches(data))
        assert "adversarial/pgd_accuracy" in trainer.callback_metrics
        losses.append(float(trainer.callback_metrics["adversarial/val_loss"]))
    assert float(trainer.callback_metrics["val_loss"]) < losses[0] <= losses[1]


# What is said.


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    messages: list[str] = []
    monkeypatch.setattr(_places, "rank_zero_info", messages.append)
    return messages


class Views(Weighted):
    def images_of(self, batch: Any) -> list[Tensor]:
        return [image for view in batch[0] for image in view]


def test_views_that_are_not_attacked_are_named_and_a_key_has_all_attacked(told: list[str]) -> None:
    views = [torch.stack(images(SIZES[:1] * 2, seed)) for seed in (1, 2)]
    clean = [image for view in views for image in view]
    found = moves(Views(), clean, (views, torch.zeros(2)))
    assert [bool(move.any()) for move in found] == [True, True, False, False]
    assert told == [
        "AdversarialTraining perturbs batch[0][0], of shape (2, 3, 4, 5), but not the others in batch[0][*]; "
        "input_key='0.*' perturbs all 2."
    ]
    for settings in ({"norm": "linf"}, {"norm": "l2"}):
        module = Views()
        found = moves(module, clean, (views, torch.zeros(2)), input_key="0.*", **settings)
        for move, weight in zip(found, own_weights(module, clean), strict=True):
            expected = weight.sign() if settings["norm"] == "linf" else weight / weight.norm()
            torch.testing.assert_close(move, EPSILON * expected)
    assert told[-1] == "AdversarialTraining perturbs batch[0][*], 2 tensors of shape (2, 3, 4, 5) each."


def test_lists_are_described(told: list[str]) -> None:
    clean = images()
    moves(Weighted(), clean, (clean, [1, 2, 3, 4]))
    assert told == ["AdversarialTraining perturbs batch[0][*], 4 tensors of shapes such as (3, 4, 5) and (3, 6, 4)."]


def test_images_alone_are_named_and_a_key_has_all_attacked(told: list[str]) -> None:
    class Alone(Weighted):
        def images_of(self, batch: Any) -> list[Tensor]:
            return list(batch)

    clean = images()
    assert [bool(move.any()) for move in moves(Alone(), clean, clean)] == [True, False, False, False]
    assert "but not the others in batch[*]; input_key='*' perturbs all 4." in told[0]
    module = Alone()
    for move, weight in zip(moves(module, clean, clean, input_key="*"), own_weights(module, clean), strict=True):
        torch.testing.assert_close(move, EPSILON * weight.sign())


# Tensors of other kinds.


def test_lists_of_tensors_of_a_class_of_their_own() -> None:
    class Asks(Weighted):
        def images_of(self, batch: Any) -> list[Tensor]:
            assert [image.labels for image in batch[0]] == [[f"c{i}" for i in range(size[-1])] for size in SIZES]
            return [Tensor.as_subclass(image, Tensor) for image in batch[0]]

    clean = images()
    module = Asks()
    found = moves(module, clean, ([labelled("fussy", image) for image in clean], [1, 2, 3, 4]))
    for move, weight in zip(found, own_weights(module, clean), strict=True):
        torch.testing.assert_close(move, EPSILON * weight.sign())


class Unused(Weighted):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.weight.sum()


ROWS = [torch.ones(2, 3), torch.ones(1, 3)]


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: torch.eye(4).to_sparse(), r"a Tensor \(sparse_coo\)"),
        (lambda: torch.nested.nested_tensor(ROWS), r"a Tensor \(nested\)"),
        pytest.param(
            lambda: torch.nested.nested_tensor(ROWS, layout=torch.jagged),
            r"a NestedTensor \(nested\)",
            marks=pytest.mark.skipif(TORCH < (2, 7), reason="torch 2.6 cannot move a jagged tensor to a device"),
        ),
    ],
    ids=["sparse", "nested", "jagged"],
)
@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype stage")
def test_tensors_that_are_not_dense_are_refused_by_name(make: Any, kind: str) -> None:
    batch = (make(), torch.ones(4))
    said = rf" cannot perturb batch\[0\], because it is not dense: it is {kind}\. Make it dense in .* or set input_key"
    with pytest.raises(TypeError, match="AdversarialTraining" + said):
        make_trainer(callbacks=[AdversarialTraining(EPSILON)], max_epochs=1).fit(Unused(), as_batches([batch]))
    trainer = make_trainer(callbacks=[AdversarialEvaluation(EPSILON)])
    with pytest.raises(TypeError, match="AdversarialEvaluation" + said):
        trainer.validate(Unused(), as_batches([batch]), verbose=False)
