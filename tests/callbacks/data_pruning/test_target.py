"""The gradient of a target is that of its mean loss; a target of another form is refused before the first batch."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, SubsetRandomSampler, TensorDataset

from lightning_grad.callbacks.data_pruning._target import TargetSet, trained_parameters
from lightning_grad.core.losses.given_functions import LossRequest
from lightning_grad.testing import make_trainer
from tests.callbacks.data_pruning.test_data_pruning import Classifier, make_data

ASKED = LossRequest("Technique")


class Reads(pl.Callback):
    """Reads the gradient of a target before the first batch."""

    def __init__(
        self,
        target: Callable[[pl.Trainer], Any] | None = None,
        asked: LossRequest = ASKED,
        include: Sequence[str] | None = None,
        positions: Sequence[int] | None = None,
    ) -> None:
        self.target, self.asked, self.include, self.positions = target, asked, include, positions
        self.found: dict[str, Tensor] = {}
        self.expected: dict[str, Tensor] = {}
        self.steps = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        target = TargetSet(trainer, pl_module, self.asked, trainer.train_dataloader, self.target)
        target.check()
        parameters = trained_parameters(pl_module, self.include, "Technique")
        self.found = target.mean_gradient(parameters, self.positions)

    def on_train_batch_end(self, *args: Any) -> None:
        self.steps += 1


class Validated(Classifier):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self(batch[0])


def fitted(folder: Path, reads: Reads | None, module: Any = None, val: Any = None, epochs: int = 1) -> Any:
    module = (Classifier() if val is None else Validated()) if module is None else module
    trainer = make_trainer(
        callbacks=[reads] if reads else [], max_epochs=epochs, num_sanity_val_steps=0, default_root_dir=folder
    )
    loader = DataLoader(make_data(), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(1))
    trainer.fit(module, loader, val)
    return module


def by_hand(module: Any, data: Any) -> dict[str, Tensor]:
    """The gradient of the mean loss in one batch."""
    module.eval()
    x, y, _ = next(iter(DataLoader(data, batch_size=len(data))))
    loss = F.cross_entropy(module(x), y)
    names, parameters = zip(*module.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], atol=1e-7, rtol=1e-5)


TARGET = Subset(make_data(30), range(20, 30))


@pytest.mark.parametrize("kind", ["loader", "data set", "validation"])
def test_it_is_the_gradient_of_the_mean_loss(tmp_path: Path, kind: str) -> None:
    val = DataLoader(TARGET, batch_size=4)
    targets = {"loader": lambda _: val, "data set": lambda _: TARGET, "validation": None}
    reads = Reads(targets[kind])
    fitted(tmp_path, reads, val=val if kind == "validation" else None)
    close(reads.found, by_hand(Classifier(), TARGET))  # batches of 4, 4 and 2: a mean of batches would be another one


def test_a_mean_of_batches_fails_the_same_test() -> None:
    parts = [by_hand(Classifier(), Subset(TARGET, rows)) for rows in (range(4), range(4, 8), range(8, 10))]
    mean = {name: sum(part[name] for part in parts) / 3 for name in parts[0]}
    with pytest.raises(AssertionError):
        close(mean, by_hand(Classifier(), TARGET))  # type: ignore[arg-type]


def test_the_run_does_not_change(tmp_path: Path) -> None:
    own = fitted(tmp_path / "own", Reads(lambda _: TARGET), epochs=2)
    plain = fitted(tmp_path / "plain", None, epochs=2)
    assert all(torch.equal(one, plain.state_dict()[name]) for name, one in own.state_dict().items())
    assert [rows for rows, _ in plain.seen] == [rows for rows, _ in own.seen[-len(plain.seen) :]]


def test_only_chosen_parameters_and_samples(tmp_path: Path) -> None:
    reads = Reads(lambda _: TARGET, include=["head"], positions=[3, 1])
    fitted(tmp_path, reads)
    expected = by_hand(Classifier(), Subset(TARGET, [3, 1]))
    close(reads.found, {name: value for name, value in expected.items() if name.startswith("head")})


def test_the_samples_of_a_subset_sampler(tmp_path: Path) -> None:
    loader = DataLoader(make_data(30), batch_size=4, sampler=SubsetRandomSampler(list(range(20, 30))))
    reads = Reads(lambda _: loader)
    fitted(tmp_path, reads)
    close(reads.found, by_hand(Classifier(), TARGET))


def loss_of_rows(module: Any, batch: Any) -> Tensor:
    return 2 * F.cross_entropy(module(batch[0]), batch[1], reduction="none")


def test_the_loss_of_a_function(tmp_path: Path) -> None:
    reads = Reads(lambda _: TARGET, LossRequest("Technique", loss_fn=loss_of_rows))
    fitted(tmp_path, reads)
    close(reads.found, {name: 2 * value for name, value in by_hand(Classifier(), TARGET).items()})


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(make_data())


X, Y = torch.zeros(5, 6), torch.zeros(5, dtype=torch.long)
REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "no labels": (TensorDataset(X), ValueError, r"batch\[1\] is missing in the target and a 1-dimensional integer"),
    "real labels": (TensorDataset(X, Y.float(), Y), ValueError, "is a 1-dimensional floating-point tensor in the tar"),
    "more dimensions": (
        TensorDataset(X[:, None], Y, Y),
        ValueError,
        "a 3-dimensional floating-point tensor in the tar",
    ),
    "a stream": (Stream(), TypeError, "reads the samples of its target by index, but the target is Stream"),
    "a loader of a stream": (DataLoader(Stream(), 4), TypeError, "but the target is Stream"),
    "whole batches": (DataLoader(make_data(), batch_size=None), TypeError, "gets whole batches from its data set"),
    "nothing": ([], ValueError, "got an empty target"),
    "no data": (3, TypeError, "but the target is int"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_other_targets_are_refused(tmp_path: Path, name: str) -> None:
    target, kind, words = REFUSED[name]
    reads = Reads(lambda _: target)
    with pytest.raises(kind, match=words):
        fitted(tmp_path, reads)
    assert reads.steps == 0


def test_validation_sets_that_cannot_be_the_target(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="takes the validation set as its target, but there is none"):
        fitted(tmp_path, Reads())
    two = [DataLoader(TARGET), DataLoader(ConcatDataset([TARGET, TARGET]))]
    with pytest.raises(ValueError, match="there are 2 validation loaders"):
        fitted(tmp_path, Reads(), val=two)


def test_parameters_that_do_not_exist_or_are_frozen() -> None:
    module = Classifier()
    with pytest.raises(ValueError, match=r"include=\.\.\.\): no parameter or module is named 'heads'"):
        trained_parameters(module, ["heads"], "Technique")
    module.head.requires_grad_(False)
    with pytest.raises(ValueError, match=r"none of the parameters that include=\['head'\] selects is trained"):
        trained_parameters(module, ["head"], "Technique")
    assert set(trained_parameters(module, None, "Technique")) == {
        f"body.{n}" for n, _ in module.body.named_parameters()
    }


class Silent(Classifier):
    """Has no loss for any batch in eval mode."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) if self.training else None


def test_a_target_without_a_loss(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found no loss in the target"):
        fitted(tmp_path, Reads(lambda _: TARGET), Silent())


class Alone(Silent):
    """A step whose loss has no gradient."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.mse_loss(batch[0], batch[0])


def test_a_loss_without_a_gradient(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"which requires no gradient\. Technique needs its gradient on the target"):
        fitted(tmp_path, Reads(lambda _: TARGET), Alone())
