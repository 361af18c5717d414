"""The indices of each training batch are known, whatever draws them, and the loader is as before afterwards."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, Sampler, default_collate

from lightning_grad.callbacks import DataPruning, RepeatedRandomSubset
from lightning_grad.core import GradCallback, during_fit
from lightning_grad.core.samples.batch_indices import BatchIndices
from lightning_grad.testing import ResumableLoader, make_trainer

SAMPLES = 22


class Numbered(torch.utils.data.Dataset):
    """Each sample holds its own index."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: Any) -> tuple[Tensor, Any]:
        if isinstance(index, list):
            return torch.tensor(index, dtype=torch.float32)[:, None], torch.tensor(index) % 3
        return torch.tensor([float(index)]), index % 3


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = batch[0] if isinstance(batch[0], list) else batch
        return torch.nn.functional.cross_entropy(self.layer(batch[0] / SAMPLES), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Notes(GradCallback):
    """Compares the indices of each batch with the batch."""

    namespace = "notes"
    _indices = during_fit[BatchIndices]()

    def __init__(self, name: str | None = None) -> None:
        super().__init__(name)
        self.seen: list[tuple[list[int], list[int]]] = []

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._indices = BatchIndices(trainer, self.undo)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        batch = batch[0] if isinstance(batch[0], list) else batch
        self.seen.append((self._indices.of_batch(batch_idx), batch[0].flatten().long().tolist()))


class Permuted(Sampler[Any]):
    """Yields numpy integers, like many a sampler of one's own."""

    def __iter__(self) -> Any:
        return iter(np.random.default_rng(0).permutation(SAMPLES))

    def __len__(self) -> int:
        return SAMPLES


def drop_some(samples: list[Any]) -> Any:
    return (
        None if any(index == 2 and x > 4 for x, index in samples) and samples[0][0] < 12 else default_collate(samples)
    )


LOADERS: dict[str, Any] = {
    "in order": lambda: DataLoader(Numbered(), 4),
    "shuffled": lambda: DataLoader(Numbered(), 4, shuffle=True),
    "a worker": lambda: DataLoader(Numbered(), 4, shuffle=True, num_workers=1),
    "persistent workers": lambda: DataLoader(Numbered(), 4, shuffle=True, num_workers=1, persistent_workers=True),
    "whole batches": lambda: DataLoader(
        Numbered(), batch_size=None, sampler=BatchSampler(RandomSampler(range(SAMPLES)), 4, False)
    ),
    "numpy integers": lambda: DataLoader(Numbered(), 4, sampler=Permuted()),
    "some batches are None": lambda: DataLoader(Numbered(), 4, shuffle=True, collate_fn=drop_some),
}


def fit(*callbacks: Any, loader: Any, ckpt: Any = None, **arguments: Any) -> Any:
    pl.seed_everything(3, verbose=False)
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    arguments = {"max_epochs": 2, "limit_val_batches": 0, "enable_checkpointing": saves, **arguments}
    trainer = make_trainer(callbacks=list(callbacks), **arguments)
    trainer.fit(Module(), loader, ckpt_path=ckpt)
    return trainer


@pytest.mark.filterwarnings("ignore:train_dataloader yielded None")
@pytest.mark.filterwarnings("ignore:.*use of fork\\(\\) may lead to deadlocks:DeprecationWarning")
@pytest.mark.parametrize("kind", LOADERS)
def test_indices_are_those_of_the_batches(kind: str) -> None:
    both, loader = (Notes(), Notes("second")), LOADERS[kind]()
    before = loader.batch_sampler, loader.sampler
    fit(*both, loader=loader)
    for notes in both:
        assert len(notes.seen) >= 5
        assert all(known == real for known, real in notes.seen), notes.seen
    assert (loader.batch_sampler, loader.sampler) == before


@pytest.mark.parametrize("notes_first", [True, False])
@pytest.mark.parametrize("other", [lambda: RepeatedRandomSubset(prune=0.5), lambda: DataPruning(prune=0.5, epoch=1)])
def test_techniques_that_choose_samples_work_next_to_it(other: Any, notes_first: bool) -> None:
    notes, technique = Notes(), other()
    both = [notes, technique] if notes_first else [technique, notes]
    fit(*both, loader=DataLoader(Numbered(), 4, shuffle=True), max_epochs=3)
    assert all(known == real for known, real in notes.seen), notes.seen
    alone = Notes()
    fit(alone, loader=DataLoader(Numbered(), 4, shuffle=True), max_epochs=3)
    assert len(notes.seen) < len(alone.seen)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_resumed_fit_and_a_reloaded_loader_know_them(tmp_path: Any) -> None:
    fit(ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1), loader=ResumableLoader(Numbered(), 4))
    for path in sorted(tmp_path.glob("*step=3.ckpt")) + sorted(tmp_path.glob("*step=9.ckpt")):
        notes = Notes()
        fit(notes, loader=ResumableLoader(Numbered(), 4), ckpt=path)
        assert notes.seen
        assert all(known == real for known, real in notes.seen), notes.seen
    both, loader = (Notes(), Notes("second")), DataLoader(Numbered(), 4, shuffle=True)
    before = loader.batch_sampler
    fit(*both, loader=loader, reload_dataloaders_every_n_epochs=1)
    assert loader.batch_sampler is before
    for notes in both:
        assert len(notes.seen) == 12
        assert all(known == real for known, real in notes.seen)


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return (Numbered()[index] for index in range(SAMPLES))


def test_what_has_no_indices_has_none() -> None:
    for loader in (DataLoader(Stream(), 4), [DataLoader(Numbered(), 4), DataLoader(Numbered(), 4)]):
        notes = Notes()
        fit(notes, loader=loader, max_epochs=1)
        assert notes.seen
        assert all(known == [] for known, _ in notes.seen)
