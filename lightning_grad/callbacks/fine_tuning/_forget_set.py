"""The samples that a module is to forget: their indices, and the gradient of their loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_grad.core import Look, LossRequest, TrainingSet, quiet, sum_over_ranks
from lightning_grad.core.losses.sample_losses import loss_of_output
from lightning_grad.core.losses.scoring import runner, scoring_loader, to_device
from lightning_grad.data.random_streams import generators_kept, numbers_kept, random_streams_kept, seed_streams
from lightning_grad.utilities.precision import loss_scale

_SMALLER = 2**4  # factor by which a loss scale that overflows is reduced
_TRIES = 8  # number of batches to try until one has a loss
Forget = Sequence[int] | Callable[[Any], Any]


def checked_forget(forget: Forget) -> list[int] | Callable[[Any], Any]:
    """Return the indices as a list, or the function.

    Raises:
        ValueError: If there are no indices, or one is negative.
    """
    if callable(forget):
        return forget
    if not len(forget) or min(forget) < 0:
        found = f"{min(forget)}" if len(forget) else "an empty list"
        raise ValueError(f"forget must hold at least one index of a sample, counted from 0; got {found}.")
    return list(forget)


def forget_indices(forget: Forget, trainer: pl.Trainer, training_set: TrainingSet, display_name: str) -> Tensor:
    """Return the sorted indices of the samples to forget.

    Args:
        forget: Indices, or a function (sample) -> bool. Every rank calls it for its share of the samples.
        trainer: The trainer.
        training_set: Its training set.
        display_name: Name of the technique, for errors.

    Raises:
        ValueError: If there are no such samples, all are such, or an index is out of range.
    """
    population, total = training_set.sampler.population, training_set.sampler.total
    if callable(forget):
        found = _chosen_by(forget, trainer, training_set)
    else:
        found = torch.tensor(sorted(set(forget)))
        if int(found[-1]) >= total:
            raise ValueError(
                f"{display_name}: forget must hold indices of the training set, from 0 to {total - 1}; got "
                f"{int(found[-1])}. If the training set is a torch.utils.data.Subset, count in the subset."
            )
    drawn = torch.isin(population, found)
    if not bool(drawn.any()):
        which = "forget returned False for" if callable(forget) else "no index in forget is among"
        raise ValueError(
            f"{display_name} finds no sample to forget: {which} all {len(population)} samples that training draws. "
            "Name at least one of them."
        )
    if bool(drawn.all()):
        raise ValueError(
            f"{display_name} would forget all {len(population)} samples that training draws, and so everything. Keep "
            "some samples to retain, or train a new model."
        )
    return population[drawn].sort().values


def _chosen_by(forget: Callable[[Any], Any], trainer: pl.Trainer, training_set: TrainingSet) -> Tensor:
    items = training_set.items(training_set.loader.dataset)
    flags = torch.zeros(training_set.sampler.total, device=trainer.strategy.root_device)
    with random_streams_kept(), generators_kept(items), numbers_kept(forget):
        for index in training_set.sampler.population[trainer.global_rank :: trainer.world_size].tolist():
            flags[index] = bool(forget(items[index]))
    return sum_over_ranks(trainer, flags).nonzero().flatten().cpu()


class ForgetPass:
    """Runs the module's own step on samples of the training set, without a trace.

    Args:
        trainer: The trainer, during a fit.
        pl_module: Its module.
        training_set: Its training set.
        asked: Requirements on the losses.
    """

    def __init__(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, training_set: TrainingSet, asked: LossRequest
    ) -> None:
        self._trainer, self._module, self._training_set, self._asked = trainer, pl_module, training_set, asked

    def look_at(self, batch: Any) -> Look:
        """Return a look at a batch, inside :meth:`batches`."""
        return Look(self._module, batch, list(range(self._samples)), self._samples, self._runner(batch), self._asked)

    def _runner(self, batch: Any) -> Callable[[], object]:
        partly = None if self._training_set.is_whole_batch else self._asked
        return runner(self._trainer, self._module, batch, partly=partly)

    @contextmanager
    def batches(self, chunks: list[list[int]]) -> Iterator[Iterator[Any]]:
        """Yield an iterator over the batches of given samples, on the device, in a quiet module."""
        loader = scoring_loader(self._training_set, None, chunks, 0, in_main_process=True)
        name, collate = self._asked.display_name, self._training_set.loader.collate_fn
        looking = quiet(self._trainer, self._module, display_name=name)
        with looking, generators_kept([loader.dataset, collate]), numbers_kept(collate):
            seed_streams(0)
            yield self._each(loader, chunks)

    def _each(self, loader: Any, chunks: list[list[int]]) -> Iterator[Any]:
        for chunk, batch in zip(chunks, loader, strict=True):
            self._samples = len(chunk)
            yield None if batch is None else to_device(self._trainer, batch)

    def mixed_batches(self) -> list[list[int]]:
        """Return the samples of some batches, drawn from the whole training set, so they have several classes."""
        sampler = self._training_set.sampler
        order = torch.randperm(len(sampler.population), generator=torch.Generator().manual_seed(0))
        mixed, size = sampler.population[order].tolist(), sampler.batch_size
        return [mixed[start : start + size] for start in range(0, min(len(mixed), _TRIES * size), size)]

    def gradients(self, forget: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradients of the mean loss of some samples, the same on all ranks; 0 where there is none.

        Raises:
            ValueError: If they are not finite, or all are 0.
        """
        trainer, size = self._trainer, self._training_set.sampler.batch_size
        mine = forget[trainer.global_rank :: trainer.world_size].tolist()
        chunks = [mine[start : start + size] for start in range(0, len(mine), size)]
        scale = loss_scale(trainer, trainer.strategy.root_device)  # fp16 would underflow
        while True:
            sums = self._sums(chunks, parameters, scale / len(forget))
            largest = torch.stack([each.abs().max() for each in sums if each.numel()]).max()
            if 0 < float(largest) < float("inf"):
                return sums
            if largest == 0 or scale <= 1:
                raise ValueError(
                    f"{self._asked.display_name} finds the salient weights by the gradient of the loss of the samples to "
                    f"forget, but its largest entry is {float(largest):g}. Start from a model whose loss on these samples "
                    "is finite and not 0."
                )
            scale = scale / _SMALLER

    def _sums(self, chunks: list[list[int]], parameters: Sequence[Tensor], scale: float | Tensor) -> list[Tensor]:
        """Return the gradients of the sum of the losses of all ranks' samples, times a factor."""
        sums = [torch.zeros_like(parameter, requires_grad=False) for parameter in parameters]
        with self.batches(chunks) as batches, torch.enable_grad():
            for chunk, batch in zip(chunks, batches, strict=True):
                loss = None if batch is None else loss_of_output(self._runner(batch)())
                if loss is None:
                    continue
                scaled = loss * len(chunk) * scale
                found = torch.autograd.grad(scaled, parameters, allow_unused=True, materialize_grads=True)
                torch._foreach_add_(sums, found)
        return [sum_over_ranks(self._trainer, each) for each in sums]
