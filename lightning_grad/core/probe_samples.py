"""The fixed samples of a probe: their choice, and how a batch is made of them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_grad.core.losses.given_functions import LossRequest
from lightning_grad.core.losses.look import Look
from lightning_grad.core.losses.row_order import RowComparison, Seen, rows_of_batch
from lightning_grad.core.losses.scoring import indexed_loader, runner, to_device
from lightning_grad.core.samples.training_loaders import keys_of, refuse_key
from lightning_grad.core.undo import UndoList
from lightning_grad.data import random_streams
from lightning_grad.utilities.batch_copies import copy_of
from lightning_grad.utilities.batches import reordered
from lightning_grad.utilities.checks import check_count, refuse_dataloader_iter
from lightning_grad.utilities.reporting import counted

Split = Literal["train", "val"]
NOUNS = {"train": "training", "val": "validation"}
_COMPARED = 8  # samples whose rows are compared in several orders
_EXACTNESS = 1e-3  # relative difference of what a step computes for the same sample in another order
_SEED = 0  # same in all looks, so that augmentation and the probe's random numbers repeat


@dataclass
class ProbeLook(Look):
    """Argument of a probe: its samples as one batch, the module in eval mode, and the position in the run.

    It inherits ``batch``, ``indices``, ``pl_module``, ``run()`` (the module's ``training_step`` on
    a copy of the batch) and ``losses()`` from :class:`Look`.

    Args:
        trainer: The trainer.
        epoch: Number of epochs completed before the current one.
        step: Step on the loggers' x axis.
        undo: Undo steps that run when the look ends, even after an error. Push ``handle.remove`` of
            each hook.
        read: Reads samples by their indices as one batch, on the device.
        batch_size: Batch size of the loader.
        is_part: Whether the samples are from one of several loaders, so the step cannot be run.
    """

    trainer: pl.Trainer = field(kw_only=True)
    epoch: int = field(kw_only=True)
    step: int = field(kw_only=True)
    undo: UndoList = field(kw_only=True)
    read: Callable[[list[int]], Any] = field(kw_only=True, repr=False)
    batch_size: int = field(kw_only=True)
    is_part: bool = field(kw_only=True, default=False)

    def on(self, batch: Any) -> Look:
        """Return a look at another batch of the same samples, for example with changed inputs."""
        run = _runner(self.trainer, self.pl_module, batch, self.asked, self.is_part)
        return Look(self.pl_module, batch, self.indices, self.total, run, self.asked, self.memory)

    def refuse_moved_rows(self, rows: Callable[[Look], Tensor]) -> None:
        """Raise if what the step computes for a sample does not follow it when the samples are reordered.

        Args:
            rows: Returns a value of each sample, (B, ...).

        Raises:
            RuntimeError: If the rows are in another order, or mix samples.
        """
        chosen = self.indices[:_COMPARED]
        batch, function = self.read(chosen), "loss_fn" if self.asked.loss_fn else ""

        def see(order: Tensor, seed: int) -> Seen:
            random_streams.seed_streams(seed)
            shown = reordered(copy_of(batch), order)
            run = _runner(self.trainer, self.pl_module, shown, self.asked, self.is_part)
            look = Look(self.pl_module, shown, chosen, self.total, run, self.asked)
            return Seen(rows_of_batch(shown, len(chosen)), {"value": rows(look).detach()})

        with random_streams.random_streams_kept():
            RowComparison(self.asked, _EXACTNESS, function).compare(see, len(chosen))

    def parts(self, size: int | None = None) -> Iterator[Look]:
        """Yield the samples in smaller batches, to save memory.

        Args:
            size: Samples per batch. Default: the loader's batch size.
        """
        size = size or self.batch_size
        for start in range(0, len(self.indices), size):
            indices = self.indices[start : start + size]
            batch = self.read(indices)
            run = _runner(self.trainer, self.pl_module, batch, self.asked, self.is_part)
            yield Look(self.pl_module, batch, indices, self.total, run, self.asked, self.memory)


def early_validation_loaders(trainer: pl.Trainer) -> Any:
    """Return a separate copy of the validation loaders, before Lightning loads its own for the first validation."""
    loaders = trainer.fit_loop.epoch_loop.val_loop._data_source.dataloader()
    return getattr(loaders, "iterables", loaders)  # unwrap a CombinedLoader of either namespace


def check_samples(samples: int | Sequence[int]) -> None:
    """Raise unless ``samples`` is a count or a list of indices.

    Raises:
        ValueError: For a count below 1, an empty list, a negative index or a duplicate.
    """
    if isinstance(samples, int):
        check_count(samples, 1, "samples")
        return
    if not samples or min(samples) < 0 or len(set(samples)) < len(samples):
        raise ValueError(f"samples must be an integer >= 1 or a list of different indices >= 0; got {list(samples)}.")


def chosen_samples(
    samples: int | Sequence[int], total: int, split: Split, display_name: str, at_most: bool = False
) -> list[int]:
    """Return the indices of the samples; a count is spread over the whole set.

    With ``at_most``, a count above the size of the set means the whole set.

    Raises:
        ValueError: If the set has too few samples.

    Example:
        >>> chosen_samples(4, 100, "val", "GradCAM")
        [0, 25, 50, 75]
        >>> chosen_samples(4, 3, "val", "GradCAM")
        Traceback (most recent call last):
        ValueError: GradCAM would inspect 4 samples, but the validation set has 3. Set samples to at most 3.
    """
    has = f"the {NOUNS[split]} set has {total}"
    if not isinstance(samples, int):
        if max(samples) >= total:
            raise ValueError(
                f"{display_name} would inspect sample {max(samples)}, but {has}. Use indices below {total}."
            )
        return [int(index) for index in samples]
    if at_most:
        samples = min(samples, total)
    if samples > total:
        raise ValueError(
            f"{display_name} would inspect {counted(samples, 'sample')}, but {has}. Set samples to at most {total}."
        )
    return [place * total // samples for place in range(samples)]


@dataclass
class ProbeSamples:
    """Reads the samples of a probe, the same in every look.

    Args:
        trainer: The trainer, in a fit that has loaded its data.
        samples: A count or indices.
        split: Set that the samples are from.
        loader_key: Loader to use if there are several.
        dataset: Callable (trainer) -> data set to read from instead; called once.
        asked: Name of the technique and advice, for errors about losses that cannot be captured.
        at_most: Whether a smaller set is used as a whole. The samples are then read only in the parts of the look, not
            as one batch, because they may be many.
        in_order: Whether the order of the samples in a batch must be that of their indices.

    Attributes:
        indices: Indices that were read; empty before the first look.
    """

    trainer: pl.Trainer
    samples: int | Sequence[int]
    split: Split
    loader_key: str | int | None
    dataset: Callable[[pl.Trainer], Any] | None
    asked: LossRequest
    at_most: bool = False
    in_order: bool = False
    indices: list[int] = field(default_factory=list, init=False)
    _own: Any = field(default=None, init=False)
    _early: Any = field(default=None, init=False)

    def look(self, pl_module: pl.LightningModule, epoch: int, step: int, undo: UndoList) -> ProbeLook:
        """Return the look that the probe gets. Call it in a quiet module, outside inference mode."""
        loader, dataset = self._loader, self._source
        self._refuse_without_indices(loader, dataset)
        total = len(dataset)
        indices = chosen_samples(self.samples, total, self.split, self.asked.display_name, self.at_most)
        read = partial(self._read, loader, dataset)
        batch = None if self.at_most else read(indices)
        if self.in_order and not self.indices:
            self._refuse_other_order(batch, read(indices[::-1]), len(indices))
        self.indices = indices
        is_part = self.split == "train" and self.loader_key is not None
        run = _runner(self.trainer, pl_module, batch, self.asked, is_part)
        random_streams.seed_streams(_SEED)
        for module in pl_module.modules():
            random_streams.seed_generators(module, _SEED, depth=1)  # no deeper: the module refers to its Trainer
        look = (pl_module, batch, indices, total, run, self.asked)
        return ProbeLook(
            *look,
            trainer=self.trainer,
            epoch=epoch,
            step=step,
            undo=undo,
            read=read,
            batch_size=_batch_size(loader),
            is_part=is_part,
        )

    def check(self) -> None:
        """Raise if the data has no indices, or the loader is not known."""
        self._refuse_without_indices(self._loader, self._loader.dataset)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Restore the random generators of the data set and of the collate function afterwards."""
        collate = self._loader.collate_fn
        with random_streams.generators_kept([self._source, collate]), random_streams.numbers_kept(collate):
            yield

    @property
    def _source(self) -> Any:
        """The data set that the samples are read from."""
        if self.dataset is None:
            return self._loader.dataset
        if self._own is None:
            self._own = self.dataset(self.trainer)
        return self._own

    def _read(self, loader: DataLoader[Any], dataset: Any, indices: list[int]) -> Any:
        with random_streams.random_streams_kept():  # reading parts must not disturb the probe's own random numbers
            random_streams.seed_streams(_SEED)
            for holder in (dataset, loader.collate_fn):
                random_streams.seed_generators(holder, _SEED)
            batch = next(iter(indexed_loader(loader, dataset, [indices], _SEED)))
            return to_device(self.trainer, copy_of(batch))  # a collate function may return the data set's own tensors

    @property
    def _loader(self) -> DataLoader[Any]:
        loaders = self._loaders
        keys = list(keys_of(loaders))
        refuse_key(self.loader_key, keys, NOUNS[self.split], self.asked.display_name)
        loader = CombinedLoader(loaders, "sequential").flattened[
            0 if self.loader_key is None else keys.index(str(self.loader_key))
        ]
        self._refuse_without_indices(loader, getattr(loader, "dataset", loader))
        return loader  # type: ignore[no-any-return]

    @property
    def _loaders(self) -> Any:
        if self.split == "train":
            return self.trainer.train_dataloader
        if self.trainer.val_dataloaders is not None:
            return self.trainer.val_dataloaders
        if self._early is None:
            self._early = early_validation_loaders(self.trainer)
        return self._early

    def _refuse_other_order(self, batch: Any, backwards: Any, samples: int) -> None:
        """Raise if the batch is the same for samples read backwards, because the collate function sorts them."""
        rows = list(zip(rows_of_batch(batch, samples), rows_of_batch(backwards, samples), strict=False))
        is_same = all(torch.equal(one, other) for one, other in rows)
        if is_same and not all(torch.equal(one, other.flip(0)) for one, other in rows):
            raise RuntimeError(
                f"{self.asked.display_name} reports values by the index of a sample, but collate_fn changes the order of "
                "the samples in a batch. Make collate_fn keep the order, and sort in the module."
            )

    def _refuse_without_indices(self, loader: Any, source: Any) -> None:
        is_indexed = hasattr(source, "__len__") and not isinstance(source, IterableDataset)
        if not isinstance(loader, DataLoader) or not is_indexed:
            raise TypeError(
                f"{self.asked.display_name} reads samples by their index, but the {NOUNS[self.split]} data has none; "
                f"got {type(source).__name__}. Return a DataLoader of a data set with __len__ and __getitem__."
            )
        if loader.batch_sampler is None and not isinstance(getattr(loader.sampler, "batch_size", None), int):
            raise TypeError(
                f"{self.asked.display_name} creates batches of single samples, but DataLoader(batch_size=None) gets "
                "whole batches from its data set. Set batch_size of the DataLoader, or use a BatchSampler as its "
                "sampler."
            )


def _batch_size(loader: DataLoader[Any]) -> int:
    sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    return int(getattr(sampler, "batch_size", 1))


def _runner(
    trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, asked: LossRequest, is_part: bool = False
) -> Callable[[], object]:
    def run() -> object:
        if not pl_module.automatic_optimization:
            raise ValueError(
                f"{asked.display_name} does not work with manual optimization, because training_step steps the "
                "optimizers. Use a probe that calls the network itself."
            )
        refuse_dataloader_iter(pl_module.training_step, asked.display_name)
        return runner(trainer, pl_module, batch, partly=asked if is_part else None)()

    return run
