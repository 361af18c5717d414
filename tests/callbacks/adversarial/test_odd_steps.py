"""Batches and steps as real projects have them: None, lazy layers, gradients inside of the step, memory formats, lengths."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_grad.callbacks import AdversarialEvaluation, AdversarialTraining
from lightning_grad.testing import assert_identical, make_trainer
from tests.callbacks.adversarial.attacked import Tape, as_batches
from tests.labelled import labelled

SIZE, WIDTH, CLASSES = 4, 6, 3


def pairs(*shape: int, count: int = 3, seed: int = 0) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(SIZE) % CLASSES
    return [[torch.randn(SIZE, *(shape or (WIDTH,)), generator=generator), labels] for _ in range(count)]


class Plain(pl.LightningModule):
    """Subclasses do what people do."""

    width = WIDTH

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net, self.before, self.real = nn.Linear(self.width, CLASSES), nn.Linear(WIDTH, WIDTH), Tape()

    def loss(self, batch: Any) -> Tensor:
        self.real(batch[0].detach().clone())
        return F.cross_entropy(self.net(batch[0].flatten(1)), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("val_loss", loss, batch_size=SIZE)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(module: Any, train: Any = None, validation: Any = None, **arguments: Any) -> dict[str, Tensor]:
    """Fit under both callbacks, and return the metrics."""
    callbacks = [AdversarialTraining(0.1), AdversarialEvaluation(0.1, steps=2)]
    trainer = make_trainer(callbacks=callbacks, **{"max_epochs": 1, "log_every_n_steps": 1, **arguments})
    trainer.fit(module, as_batches(train or pairs()), as_batches(validation or pairs()))
    return dict(trainer.callback_metrics)


class Rejects(Plain):
    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch is None else super().validation_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:train_dataloader yielded None")
def test_batches_that_are_none_are_passed_over() -> None:
    one, two, three = pairs()
    expected = run(Rejects(), [one, two, three], [one, two])
    for validation in ([None, one, two], [one, None, two]):
        found = run(Rejects(), [one, two, three], validation)
        assert found["val_loss"] == expected["val_loss"]
        assert found["adversarial/val_loss"] == pytest.approx(float(expected["adversarial/val_loss"]), abs=1e-3)
    assert torch.isfinite(run(Rejects(), [one, None, three], [one])["adversarial/val_loss"])


class Penalised(Plain):
    """Differentiates by its input, as networks for physics and penalties of gradients do."""

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        logits = self.net(x.requires_grad_())
        (gradient,) = torch.autograd.grad(logits.square().sum(), x, create_graph=torch.is_grad_enabled())
        return F.cross_entropy(logits, y) + gradient.square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]), batch_size=SIZE)


class Prepared(Penalised):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0].clone().requires_grad_(self.trainer.training), batch[1]]

    def loss(self, batch: Any) -> Tensor:
        assert batch[0].requires_grad, "a hook has prepared it"
        return super().loss(batch)


@pytest.mark.parametrize("make", [Penalised, Prepared])
def test_a_step_that_differentiates_by_its_input(make: Any) -> None:
    found = run(make())
    assert found["adversarial/loss_gain"] > 0
    assert "adversarial/pgd_accuracy" in found


class Learns(Plain):
    """A layer in front of the step learns by it."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [self.before(batch[0]), batch[1]]


def test_what_makes_the_input_learns_as_without_an_attack() -> None:
    left = []
    for callbacks in ([], [AdversarialTraining(1e-9, check_every_n_epochs=None)]):
        module = Learns()
        start = module.before.weight.detach().clone()
        make_trainer(callbacks=callbacks, max_epochs=1).fit(module, as_batches(pairs()))
        left.append(module.before.weight.detach() - start)
    assert left[0].abs().max() > 0
    torch.testing.assert_close(left[1], left[0], atol=1e-6, rtol=1e-4)


class Last(Plain):
    width = 3 * 4 * 5

    def loss(self, batch: Any) -> Tensor:
        assert batch[0].is_contiguous(memory_format=torch.channels_last)
        return super().loss(batch)


def test_memory_formats_stay() -> None:
    data = [[x.to(memory_format=torch.channels_last), y] for x, y in pairs(3, 4, 5)]
    assert run(Last(), data, data)["adversarial/loss_gain"] > 0


class Masked(Plain):
    """Padded sequences: what is padded does not count."""

    width = 5

    def loss(self, batch: Any) -> Tensor:
        x, mask = batch["x"], batch["mask"].unsqueeze(-1)
        return F.cross_entropy((self.net(x) * mask).sum(1) / mask.sum(1), batch["y"])


def test_padded_sequences_of_which_the_lengths_come_first() -> None:
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    empty = torch.zeros(0, 2, dtype=torch.long)
    data = [
        {"extra": empty, "lengths": mask.sum(1), "mask": mask, "x": torch.randn(2, 3, 5), "y": torch.tensor([0, 1])}
    ]
    found = run(Masked(), data, data)
    assert found["adversarial/val_loss"] > found["val_loss"]


class Bytes(Plain):
    width = 3 * 4 * 4

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch[0].float().flatten(1) / 255), batch[1])


class Converted(Bytes):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0].float(), batch[1]]


def test_images_of_bytes_are_refused_with_a_way_out_that_works() -> None:
    generator = torch.Generator().manual_seed(0)
    data = [[torch.randint(256, (SIZE, 3, 4, 4), dtype=torch.uint8, generator=generator), torch.arange(SIZE) % CLASSES]]
    settings: dict[str, Any] = {"epsilon": 8.0, "bounds": [0.0, 255.0]}
    for callback in (AdversarialTraining(**settings), AdversarialEvaluation(**settings, steps=2)):
        arguments: dict[str, Any] = {"callbacks": [callback], "max_epochs": 1, "num_sanity_val_steps": 0}
        with pytest.raises(TypeError, match=r"torch\.uint8.*in on_after_batch_transfer"):
            make_trainer(**arguments).fit(Bytes(), as_batches(data), as_batches(data))
        make_trainer(**arguments).fit(Converted(), as_batches(data), as_batches(data))


class Lazy(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.LazyLinear(CLASSES)


def test_lazy_layers_are_refused_before_they_have_a_size_with_a_way_out_that_works() -> None:
    arguments: dict[str, Any] = {"max_epochs": 1, "num_sanity_val_steps": 0}
    with pytest.raises(
        RuntimeError,
        match=r"AdversarialTraining cannot run Lazy .* 'net\.weight' has no size yet\. Run the network once",
    ):
        make_trainer(callbacks=[AdversarialTraining(0.1)], **arguments).fit(Lazy(), as_batches(pairs()))
    module = Lazy()
    with torch.no_grad():
        module.net(pairs()[0][0])
    make_trainer(callbacks=[AdversarialTraining(0.1)], **arguments).fit(module, as_batches(pairs()))


def test_an_evaluation_in_a_run_that_logs_nothing_says_so() -> None:
    trainer = pl.Trainer(
        barebones=True, accelerator="cpu", max_epochs=1, callbacks=[AdversarialEvaluation(0.1, steps=1)]
    )
    with pytest.warns(UserWarning, match=r"AdversarialEvaluation repeats .* Trainer\(barebones=True\) logs nothing"):
        trainer.fit(Quiet(), as_batches(pairs()), as_batches(pairs()))


class Quiet(Plain):
    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)


class Words(Plain):
    """Embeds tokens that know their language; so does what the embedding gives."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, WIDTH)

    def loss(self, batch: Any) -> Tensor:
        assert batch[0].labels
        found = self.words(batch[0])
        return F.cross_entropy(self.net(Tensor.as_subclass(found, Tensor).mean(1)), batch[1])


@pytest.mark.parametrize("kind", ["labelled", "fussy", "losing"])
def test_tokens_of_a_class_of_their_own(kind: str) -> None:
    tokens = torch.randint(7, (SIZE, 3), generator=torch.Generator().manual_seed(0))
    data = [[labelled(kind, tokens), torch.arange(SIZE) % CLASSES]]
    found = run(Words(), data, data)
    assert found["adversarial/val_loss"] > found["val_loss"]
    assert found["adversarial/loss_gain"] > 0


class Inputs(Plain):
    """Several inputs by name, of which one is attacked."""

    def loss(self, batch: Any) -> Tensor:
        self.real({name: batch[name].detach().clone() for name in ("image", "depth")})
        return F.cross_entropy(self.net(batch["image"] + batch["depth"]), batch["label"])


@pytest.mark.parametrize(("key", "attacked"), [(None, ["image"]), ("depth", ["depth"]), ("*", [])])
def test_several_inputs_by_name(key: Any, attacked: list[str]) -> None:
    (x, y), (z, _), _ = pairs()
    batch = {"image": x, "depth": z, "label": y}
    callback = AdversarialTraining(0.1, input_key=key, check_every_n_epochs=None)
    trainer = make_trainer(callbacks=[callback], max_epochs=1)
    if key == "*":
        with pytest.raises(ValueError, match=r"input_key='\*' must name floating-point tensors of one dtype"):
            trainer.fit(Inputs(), as_batches([batch]))
        return
    module = Inputs()
    trainer.fit(module, as_batches([batch]))
    changed = [name for name in ("image", "depth") if not torch.equal(module.real.seen[-1][name], batch[name])]
    assert changed == attacked
    assert_identical(batch, {"image": x, "depth": z, "label": y})
