"""``DataLoader(batch_size=None)`` with a sampler of batches: the data set takes lists of indices (single-cell tools)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
from lightning_grad.data.list_items import ListItems
from tests.contract.projects import make_classifier, make_data, make_trainer

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
    "el2n": lambda: [DataPruning(0.5, epoch=1, figure=False, show=2)],
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
    with pytest.raises(TypeError, match=r"InfoBatch knows samples by their index.* Chunks yields slice\(0, 8, None\)"):
        weights(
            [InfoBatch()], DataLoader(Rows(), batch_size=None, sampler=Chunks(48, lambda r: slice(r[0], r[-1] + 1)))
        )


def test_score_files_know_the_data_set_again(tmp_path: Path) -> None:
    path = str(tmp_path / "scores.npz")
    cells = Cells()
    loader = DataLoader(cells, batch_size=None, sampler=samplers("in order", cells))
    weights([DataPruning(0.0, epoch=1, save_scores=path, figure=False, show=0)], loader)
    assert load_scores(path, ListItems(cells)).fingerprint is not None
    weights([DataPruning(0.5, epoch=1, score_files=[path], figure=False, show=0)], loader)
    cells.base.tensors[0].add_(1.0)
    with pytest.raises(ValueError, match="were made for another data set"):
        weights([DataPruning(0.5, epoch=1, score_files=[path], figure=False, show=0)], loader)


def test_a_sampler_of_single_indices_is_refused_and_the_way_out_works() -> None:
    cells = Cells()
    with pytest.raises(
        TypeError, match=r"with batch_size=None RandomSampler yields one index at a time.* BatchSampler as"
    ):
        weights([InfoBatch()], DataLoader(cells, batch_size=None, sampler=RandomSampler(cells)))
    weights([InfoBatch()], DataLoader(cells, batch_size=None, sampler=BatchSampler(RandomSampler(cells), BATCH, False)))
