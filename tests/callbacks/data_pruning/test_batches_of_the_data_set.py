"""``DataLoader(batch_size=None)`` with a sampler of batches: the data set takes lists of indices (single-cell tools)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Sampler, SequentialSampler

from lightning_grad.callbacks import (
    DataPruning,
    InfoBatch,
    LossReweighting,
    RepeatedRandomSubset,
    UniformLearning,
)
from lightning_grad.data import load_scores
from lightning_grad.data.fingerprints import ListItems
from lightning_grad.testing import make_classifier, make_data, make_trainer

BATCH = 8


class Cells(Dataset[Any]):
    """Rows of a matrix, many at once; a single index is an error, as in some of these tools."""

    def __init__(self) -> None:
        self.base = make_data()

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, indices: Any) -> Any:
        assert isinstance(indices, list), "rows are read by lists"
        assert all(type(index) is int for index in indices)
        return self.base[indices]


class Chunks(Sampler[Any]):
    """A sampler of batches of a library's own: it says how large they are."""

    def __init__(self, total: int, form: Any = list) -> None:
        self.total, self.form, self.batch_size = total, form, BATCH

    def __iter__(self) -> Iterator[Any]:
        return iter([self.form(range(i, min(self.total, i + BATCH))) for i in range(0, self.total, BATCH)])

    def __len__(self) -> int:
        return -(-self.total // BATCH)


TECHNIQUES: dict[str, Any] = {
    "none": list,
    "el2n": lambda: [DataPruning(0.5, epoch=1, figure=False, num_shown=2)],
    "grand": lambda: [DataPruning(0.5, "grand", epoch=1, figure=False)],
    "aum": lambda: [DataPruning(0.5, "aum", epoch=2, budget="steps", figure=False)],
    "random": lambda: [DataPruning(0.5, keep="random", epoch=0)],
    "subsets": lambda: [RepeatedRandomSubset()],
    "infobatch": lambda: [InfoBatch()],
    "uniform": lambda: [UniformLearning(epoch=1)],
    "reweighting": lambda: [LossReweighting()],
}


def samplers(kind: str, data: Any) -> Any:
    sampler = RandomSampler(data, generator=torch.Generator().manual_seed(3)) if kind == "random" else None
    if kind == "own":
        return Chunks(len(data))
    return BatchSampler(sampler or SequentialSampler(data), BATCH, drop_last=False)


def weights(callbacks: list[Any], loader: DataLoader[Any]) -> torch.Tensor:
    module = make_classifier()
    make_trainer(callbacks=callbacks, max_epochs=3).fit(module, loader)
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


@pytest.mark.parametrize("name", TECHNIQUES)
@pytest.mark.parametrize("kind", ["random", "in order", "own"])
def test_every_technique_does_what_it_does_with_ordinary_batches(name: str, kind: str) -> None:
    cells = Cells()
    sampler = samplers(kind, cells)
    loader = DataLoader(cells, batch_size=None, sampler=sampler)
    ordinary = DataLoader(cells.base, batch_sampler=samplers(kind, cells.base))
    assert torch.equal(weights(TECHNIQUES[name](), loader), weights(TECHNIQUES[name](), ordinary))
    assert loader.sampler is sampler


@pytest.mark.parametrize("persistent", [False, True])
def test_with_workers(persistent: bool) -> None:
    def found(**arguments: Any) -> torch.Tensor:
        cells = Cells()
        loader = DataLoader(cells, batch_size=None, sampler=samplers("in order", cells), **arguments)
        return weights(TECHNIQUES["el2n"](), loader)

    assert torch.equal(found(num_workers=2, persistent_workers=persistent), found())


def test_arrays_of_indices_are_passed_on_and_slices_are_refused() -> None:
    class Rows(Cells):
        def __getitem__(self, indices: Any) -> Any:
            return super().__getitem__(np.asarray(indices).tolist())

    weights([InfoBatch()], DataLoader(Rows(), batch_size=None, sampler=Chunks(48, np.array)))
    with pytest.raises(TypeError, match=r"InfoBatch identifies samples by index.* Chunks yields slice\(0, 8, None\)"):
        weights(
            [InfoBatch()], DataLoader(Rows(), batch_size=None, sampler=Chunks(48, lambda r: slice(r[0], r[-1] + 1)))
        )


def test_score_files_know_the_data_set_again(tmp_path: Path) -> None:
    path = str(tmp_path / "scores.npz")
    cells = Cells()
    loader = DataLoader(cells, batch_size=None, sampler=samplers("in order", cells))
    weights([DataPruning(0.0, epoch=1, save_scores=path, figure=False, num_shown=0)], loader)
    assert load_scores(path, ListItems(cells)).fingerprint is not None
    weights([DataPruning(0.5, epoch=1, score_files=[path], figure=False, num_shown=0)], loader)
    cells.base.tensors[0].add_(1.0)
    with pytest.raises(ValueError, match="belong to another data set"):
        weights([DataPruning(0.5, epoch=1, score_files=[path], figure=False, num_shown=0)], loader)


def test_a_sampler_of_single_indices_is_refused_and_the_way_out_works() -> None:
    cells = Cells()
    with pytest.raises(TypeError, match=r"is RandomSampler, which has no batch_size.* BatchSampler as"):
        weights([InfoBatch()], DataLoader(cells, batch_size=None, sampler=RandomSampler(cells)))
    weights([InfoBatch()], DataLoader(cells, batch_size=None, sampler=BatchSampler(RandomSampler(cells), BATCH, False)))


class Ranks(pl.LightningModule):
    """Loads its data when the ranks are known, and notes what its batches hold."""

    def __init__(self, by_hand: bool, folder: Path) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(16, 4)
        self.by_hand, self.folder = by_hand, folder
        self.seen: list[list[float]] = []

    def train_dataloader(self) -> Any:
        cells = Cells()
        sampler: Any = RandomSampler(cells)
        if self.by_hand:
            ranks = self.trainer.world_size, self.trainer.global_rank
            sampler = torch.utils.data.DistributedSampler(cells, *ranks)  # type: ignore[arg-type]
        return DataLoader(cells, batch_size=None, sampler=BatchSampler(sampler, BATCH, False))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append(batch[0][:, 0, 0].tolist())
        return torch.nn.functional.cross_entropy(self.layer(batch[0].mean(1)), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_train_end(self) -> None:
        torch.save(self.seen, self.folder / f"{self.trainer.global_rank}.pt")


def test_two_ranks_are_told_how_to_share_the_samples(tmp_path: Path) -> None:
    def fit(by_hand: bool, **arguments: Any) -> Any:
        trainer = make_trainer(
            callbacks=[RepeatedRandomSubset()], max_epochs=1, strategy="ddp_fork", devices=2, **arguments
        )
        trainer.fit(Ranks(by_hand, tmp_path))

    with pytest.raises(Exception, match=r"use_distributed_sampler=False.*BatchSampler\(DistributedSampler\(data"):
        fit(by_hand=False)
    fit(by_hand=True, use_distributed_sampler=False)
    one, other = ([x for batch in torch.load(tmp_path / f"{rank}.pt") for x in batch] for rank in (0, 1))
    assert len(one) == len(other) == 12
    assert not set(one) & set(other)
