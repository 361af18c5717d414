"""The target of a selection: labeled samples like those that the module is for, and the gradient of their loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, SubsetRandomSampler

from lightning_grad.core.losses.given_functions import LossRequest
from lightning_grad.core.losses.look import Look, SkippedBatchError
from lightning_grad.core.losses.sample_losses import trained_loss
from lightning_grad.core.losses.scoring import indexed_loader, runner, to_device
from lightning_grad.core.probe_samples import early_validation_loaders
from lightning_grad.core.quiet import quiet
from lightning_grad.core.ranks import sum_over_ranks
from lightning_grad.data.random_streams import (
    generators_kept,
    numbers_kept,
    random_streams_kept,
    seed_generators,
    seed_streams,
)
from lightning_grad.utilities.batch_copies import copy_of
from lightning_grad.utilities.batches import form_of
from lightning_grad.utilities.parameters import all_names, check_patterns, selects

if TYPE_CHECKING:
    from collections.abc import Iterator

_COMPARED = 2  # samples in the batches whose form is compared
_FEW = 4  # batches that are read in the main process: starting workers takes longer
_WORKERS = ("num_workers", "timeout", "worker_init_fn", "multiprocessing_context", "prefetch_factor")
_RETURN = "Make target return a DataLoader or data set of samples like those of the training set."


@dataclass
class TargetSet:
    """Reads the samples of a target set, and measures the mean gradient of their loss.

    The loss is that of the module's own ``training_step``, in eval mode and without a trace. So it may be any loss. With
    ``loss_fn`` or ``loss_index`` in ``asked``, it is the mean of these losses.

    Args:
        trainer: The trainer, in a fit that has loaded its data.
        pl_module: Its module.
        asked: Name of the technique, and which loss counts.
        loader: The training loader.
        target: Callable (trainer) -> DataLoader or data set; called once. ``None`` takes the validation loader.
        is_whole_batch: Whether ``training_step`` gets the batch of this loader alone.
        seed: Seed of the random streams while reading, so the same samples come each time.
    """

    trainer: pl.Trainer
    pl_module: pl.LightningModule
    asked: LossRequest
    loader: DataLoader[Any]
    target: Callable[[pl.Trainer], Any] | None = None
    is_whole_batch: bool = True
    seed: int = 0
    _source: tuple[DataLoader[Any], Any] | None = field(default=None, init=False)  # loader and data set

    def __len__(self) -> int:
        """Return the number of target samples."""
        return len(self.population)

    @cached_property
    def population(self) -> Sequence[int]:
        """Indices of the target samples in their data set; only the subset for a ``SubsetRandomSampler``."""
        loader, dataset = self._found
        own: Any = loader.dataset if dataset is None else dataset
        sampler = getattr(loader.batch_sampler, "sampler", None) if dataset is None else None
        return sorted(sampler.indices) if isinstance(sampler, SubsetRandomSampler) else range(len(own))

    @property
    def batch_size(self) -> int:
        """Number of samples in a batch of the target."""
        loader = self._found[0]
        sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        return int(getattr(sampler, "batch_size", 1))

    def check(self) -> None:
        """Raise unless a target batch has the form of a training batch. Call it before the first batch.

        Raises:
            TypeError: If the target is not a DataLoader or data set with indices.
            ValueError: If it is empty, or its batches have another form.
        """
        loader, dataset = self._found
        count = min(_COMPARED, len(self), len(self.loader.dataset))  # type: ignore[arg-type]
        if not count:
            raise ValueError(f"{self.asked.display_name} got an empty target. {_RETURN}")
        own = form_of(self._first(self.loader, None, list(range(count))))
        found = form_of(self._first(loader, dataset, list(self.population[:count])))
        different = [place for place in {**own, **found} if own.get(place) != found.get(place)]
        if different:
            place = different[0]
            raise ValueError(
                f"{self.asked.display_name} runs training_step on the target, so its batches must have the form of the "
                f"training batches, but {place} is {found.get(place, 'missing')} in the target and "
                f"{own.get(place, 'missing')} in training. {_RETURN}"
            )

    def mean_gradient(
        self, parameters: Mapping[str, Tensor], positions: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """Return the gradient of the mean loss over the target samples; all ranks return the same.

        It takes the memory of one gradient of these parameters, twice while a batch is added.

        Args:
            parameters: Parameters by name.
            positions: Positions of the samples to use in ``population``. Default: all samples.

        Returns:
            dict: A tensor in the shape of each parameter, in float32, or float64 for parameters in float64.

        Raises:
            ValueError: If no batch has a loss.
        """
        chosen = list(self.population if positions is None else map(self.population.__getitem__, positions))
        size = self.batch_size
        chunks = [chosen[start : start + size] for start in range(0, len(chosen), size)]
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        mine = chunks[rank::ranks]
        # A step may communicate with other ranks, so all must run it equally often.
        missing = math.ceil(len(chunks) / ranks) - len(mine)
        sums = {name: torch.zeros_like(p, dtype=_dtype(p), requires_grad=False) for name, p in parameters.items()}
        count = torch.zeros((), dtype=torch.float32, device=self.trainer.strategy.root_device)
        memory: dict[str, Any] = {}
        with self._reading(), torch.enable_grad():
            for number, (batch, indices) in enumerate(self._batches([*mine, *chunks[:missing]])):
                gradients = self._gradient(batch, indices, number, list(parameters.values()), memory)
                if gradients is None or number >= len(mine):
                    continue
                count += len(indices)
                for total, gradient in zip(sums.values(), gradients, strict=True):
                    if gradient is not None:
                        total.add_(gradient.detach(), alpha=len(indices))
        count = sum_over_ranks(self.trainer, count)
        if not count:
            raise ValueError(
                f"{self.asked.display_name} found no loss in the target: every batch was None, or training_step returned "
                "None for it. Make them return something in eval mode."
            )
        return {name: sum_over_ranks(self.trainer, total).div_(count.to(total)) for name, total in sums.items()}

    def _gradient(
        self, batch: Any, indices: list[int], number: int, parameters: list[Tensor], memory: dict[str, Any]
    ) -> Sequence[Tensor | None] | None:
        """Return the gradient of the mean loss of a batch; ``None`` if there is no batch or no loss."""
        if batch is None:
            return None
        batch = to_device(self.trainer, copy_of(batch))  # a collate function may return the data set's own tensors
        part = None if self.is_whole_batch else self.asked
        run = runner(self.trainer, self.pl_module, batch, number, part)
        look = Look(self.pl_module, batch, indices, len(self), run, self.asked, memory)
        try:
            loss = self._loss(look)
        except SkippedBatchError:
            return None
        return torch.autograd.grad(loss, parameters, allow_unused=True)

    def _loss(self, look: Look) -> Tensor:
        if self.asked.loss_fn is not None:
            return look.losses(keep_graph=True).losses.nanmean()
        if self.asked.loss_index is not None:
            return look.loss(keep_graph=True).losses.nanmean()
        output = look.run()
        if output is None:
            raise SkippedBatchError
        advice = f"{self.asked.display_name} needs its gradient on the target. {self.asked.advice}"
        return trained_loss(output, advice).reshape(())

    # The samples are read.

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Let the module be quiet, and all random numbers be those of the seed."""
        advice, name = f", or {self.asked.way_out}", self.asked.display_name
        with quiet(self.trainer, self.pl_module, advice=advice, display_name=name), self._kept():
            for module in self.pl_module.modules():
                seed_generators(module, self.seed, depth=1)  # no deeper: the module refers to its Trainer
            yield

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """Restore the global random streams, and those of the data, and seed them inside."""
        loader, dataset = self._found
        with ExitStack() as stack:
            for each, own in ((self.loader, None), (loader, dataset)):
                holder = [each.dataset if own is None else own, each.collate_fn]
                stack.enter_context(generators_kept(holder))
                stack.enter_context(numbers_kept(each.collate_fn))
            stack.enter_context(random_streams_kept())
            seed_streams(self.seed)
            for part in (loader.dataset if dataset is None else dataset, loader.collate_fn):
                seed_generators(part, self.seed)
            yield

    def _first(self, loader: DataLoader[Any], dataset: Any, indices: list[int]) -> Any:
        with self._kept():
            return next(iter(indexed_loader(loader, dataset, [indices], self.seed)))

    def _batches(self, chunks: list[list[int]]) -> Iterator[tuple[Any, list[int]]]:
        loader, dataset = self._found
        workers = {name: getattr(loader, name) for name in _WORKERS} if len(chunks) > _FEW else {}
        yield from zip(indexed_loader(loader, dataset, chunks, self.seed, **workers), chunks, strict=True)

    @property
    def _found(self) -> tuple[DataLoader[Any], Any]:
        """The loader whose settings are used, and the data set to read instead of its own, if the target is one."""
        if self._source is None:
            given = self._validation() if self.target is None else self.target(self.trainer)
            self._source = (given, None) if isinstance(given, DataLoader) else (self.loader, given)
            self._refuse_without_indices(given)
        return self._source

    def _validation(self) -> Any:
        name = self.asked.display_name
        if not self.trainer.fit_loop.epoch_loop.val_loop._data_source.is_defined():
            raise ValueError(
                f"{name} takes the validation set as its target, but there is none. Set target to a function that takes "
                "the trainer and returns a DataLoader or data set."
            )
        loaders = self.trainer.val_dataloaders
        loaders = early_validation_loaders(self.trainer) if loaders is None else loaders
        found = CombinedLoader(loaders, "sequential").flattened
        if len(found) != 1:
            raise ValueError(
                f"{name} takes the validation set as its target, but there are {len(found)} validation loaders. Set "
                "target to a function that takes the trainer and returns one of them."
            )
        return found[0]

    def _refuse_without_indices(self, given: Any) -> None:
        source = given.dataset if isinstance(given, DataLoader) else given
        is_indexed = hasattr(source, "__len__") and hasattr(source, "__getitem__")
        if not is_indexed or isinstance(source, (IterableDataset, dict)):
            self._source = None
            raise TypeError(
                f"{self.asked.display_name} reads the samples of its target by index, but the target is "
                f"{type(source).__name__}. Use a DataLoader of a data set with __len__ and __getitem__, or such a data set."
            )
        if isinstance(given, DataLoader) and given.batch_sampler is None and not hasattr(given.sampler, "batch_size"):
            self._source = None
            raise TypeError(
                f"{self.asked.display_name} forms batches of the target's samples, but DataLoader(batch_size=None) gets "
                "whole batches from its data set. Set batch_size of the DataLoader, or return the data set."
            )


def _dtype(parameter: Tensor) -> torch.dtype:
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def target_sets(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    asked: LossRequest,
    loader: DataLoader[Any],
    target: Callable[[pl.Trainer], Any] | None,
    is_whole_batch: bool,
    seed: int,
) -> list[TargetSet]:
    """Return the target sets: one, or one for each loader or data set if ``target`` returns a list or mapping of them.

    Raises:
        TypeError: If a target has no indices.
    """
    given = [None] if target is None else [target(trainer)]
    parts = list(given[0].values()) if isinstance(given[0], Mapping) else given[0]
    if isinstance(parts, (list, tuple)) and parts and all(isinstance(each, (DataLoader, Dataset)) for each in parts):
        given = list(parts)
    makes = [None if target is None else (lambda _, each=each: each) for each in given]
    return [TargetSet(trainer, pl_module, asked, loader, make, is_whole_batch, seed) for make in makes]


def trained_parameters(
    pl_module: pl.LightningModule, include: Sequence[str] | None, display_name: str
) -> dict[str, Tensor]:
    """Return the trained parameters that name patterns select, by name.

    Raises:
        ValueError: If a pattern matches no name, or no selected parameter is trained.
    """
    check_patterns(pl_module, display_name, include=include)
    names = all_names(pl_module)
    found: dict[str, Tensor] = {
        name: parameter
        for name, parameter in pl_module.named_parameters()
        if parameter.requires_grad and selects(names[id(parameter)], include)
    }
    if not found:
        chosen = "no parameter is" if include is None else f"none of the parameters that include={include} selects is"
        raise ValueError(f"{display_name} compares gradients, but {chosen} trained. Unfreeze some, or include others.")
    return found
