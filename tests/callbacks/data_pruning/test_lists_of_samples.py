"""Batches with a list for each sample, as of images and their boxes: the sampler tells how many samples they hold."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, Sampler

from lightning_grad.callbacks import InfoBatch, LossReweighting, RepeatedRandomSubset
from lightning_grad.core.losses.batch_sizes import batch_size_of
from lightning_grad.functional import loss_weights
from tests.callbacks.data_pruning.test_data_pruning import train

SAMPLES, BATCH = 22, 8


class Boxes(pl.LightningModule):
    """Finds boxes in a list of images of several sizes; the loss is a mean over images of means over boxes."""

    def __init__(self) -> None:
        super().__init__()
        pl.seed_everything(3, verbose=False)
        self.body, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 4)

    def losses(self, batch: Any) -> Tensor:
        found = []
        for image, target in zip(*batch, strict=True):
            places = self.head(self.body(image).flatten(1).T[: len(target["boxes"])])
            found.append((places - target["boxes"]).abs().mean())
        return torch.stack(found)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        losses = self.losses(batch)
        self.log("loss", losses.mean())
        return {"loss": losses.mean()}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class ByHand(Boxes):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        losses = self.losses(batch)
        return (loss_weights(losses, "linupper", 0.5) * losses).sum()


def items(number: int = SAMPLES) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(3, 4 + i % 3, 6, generator=generator), {"boxes": torch.rand(1 + i % 4, 4, generator=generator)})
        for i in range(number)
    ]


def collate(batch: list[Any]) -> Any:
    return tuple(zip(*batch, strict=True))


def loader(data: Any = None, **arguments: Any) -> Any:
    return DataLoader(items() if data is None else data, collate_fn=collate, **arguments or {"batch_size": BATCH})


def reweighting(**arguments: Any) -> LossReweighting:
    return LossReweighting(**{"temperature": 0.5, "start_temperature": 0.5, "warmup_fraction": 0.0, **arguments})


def weights_after(callback: Any, module: Any, **arguments: Any) -> list[Tensor]:
    return list(train(callback, module, **{"loader": loader(), **arguments}).module.parameters())


def test_weights_are_those_by_hand() -> None:
    found = weights_after(reweighting(), Boxes())  # in batches of 8, 8 and 6
    for one, other in zip(found, weights_after(pl.Callback(), ByHand()), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("first", [True, False])
def test_who_chooses_the_samples_tells_how_many_there_are(first: bool) -> None:
    subset, callback = RepeatedRandomSubset(0.4, seed=1), reweighting()
    pair = (subset, callback) if first else (callback, subset)
    found = weights_after(pair[0], Boxes(), more=pair[1:])
    expected = weights_after(RepeatedRandomSubset(0.4, seed=1), ByHand())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_the_warm_up_looks_too() -> None:
    class Mixing(Boxes):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.losses(batch).square().mean().sqrt()

    with pytest.raises(RuntimeError, match=r"sqrt .* mixes the samples"):
        train(reweighting(warmup_fraction=0.9), Mixing(), loader=loader())


def test_infobatch_knows_them_anyway() -> None:
    callback = InfoBatch(0.5, prune_until=1.0)
    train(callback, Boxes(), loader=loader())
    assert callback._values.isfinite().all()


# Where nothing tells.


class Blocks(Sampler[list[int]]):
    """Batches of a size that changes."""

    def __iter__(self) -> Any:
        yield from (list(range(8)), list(range(8, 11)), list(range(11, 22)))

    def __len__(self) -> int:
        return 3


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(items())


UNKNOWN = {"another sampler": {"batch_sampler": Blocks()}, "a stream": {"batch_size": BATCH, "data": Stream()}}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_else_it_is_refused_with_a_way_out(kind: str) -> None:
    words = "no sampler of torch provides the number. LossReweighting needs the loss .* set loss_fn="
    with pytest.raises(RuntimeError, match=words):
        train(reweighting(total_steps=6), Boxes(), loader=loader(**UNKNOWN[kind]))
    given = loader(**UNKNOWN[kind])
    callback = reweighting(total_steps=6, loss_fn=lambda module, batch: module.losses(batch))
    found = weights_after(callback, Boxes(), loader=given)
    for one, other in zip(found, weights_after(pl.Callback(), ByHand(), loader=loader(**UNKNOWN[kind])), strict=True):
        torch.testing.assert_close(one, other)


class OneCall(Boxes):
    """Has one call of a loss for all boxes of all images."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        found, truth = [], []
        for image, target in zip(*batch, strict=True):
            found.append(self.head(self.body(image).flatten(1).T[: len(target["boxes"])]))
            truth.append(target["boxes"])
        return F.l1_loss(torch.cat(found), torch.cat(truth))


def test_rows_of_no_sample_are_refused() -> None:
    with pytest.raises(ValueError, match=r"l1_loss got \d+ rows for 8 samples"):
        train(reweighting(), OneCall(), loader=loader())


@pytest.mark.parametrize(
    ("batch", "told", "expected"),
    [
        ([torch.zeros(4, 2), [torch.zeros(4), torch.zeros(4)]], 4, 4),  # two tensors in a list
        ([torch.zeros(4, 2), [torch.zeros(4), torch.zeros(4)]], None, 4),
        ([[torch.zeros(3, 8), torch.zeros(3, 6)], ["a cat", "a dog"]], 2, 2),  # of three channels each
        ([[torch.zeros(3, 8), torch.zeros(3, 6)], {"boxes": [torch.zeros(1), torch.zeros(5)]}], 2, 2),
        ([[torch.zeros(3, 8), torch.zeros(2, 6)], [1, 2, 3]], 2, None),
        ([[torch.zeros(3, 8), torch.zeros(2, 6)], [1, 2]], 3, None),
        ([torch.zeros(4, 2), torch.zeros(3)], 4, None),
    ],
)
def test_the_number_that_is_told_counts_where_all_lists_agree(
    batch: Any, told: int | None, expected: int | None
) -> None:
    assert batch_size_of(batch, lambda: told) == expected
