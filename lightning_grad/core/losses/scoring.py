"""Looking at every sample of a training set through the module's own ``training_step``, without a trace.

:func:`look_at_all` runs the pass; what is measured of a batch is a function of a :class:`~.look.Look`.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_grad.core.losses.given_functions import ANY_LOSS, LossRequest
from lightning_grad.core.losses.look import Look, Measure, SkippedBatchError
from lightning_grad.core.quiet import quiet
from lightning_grad.core.ranks import first_of_ranks, mean_over_ranks
from lightning_grad.core.samples.training_set import TrainingSet
from lightning_grad.data.borrowed_workers import BorrowedWorkers
from lightning_grad.data.random_streams import generators_kept, numbers_kept, seed_streams
from lightning_grad.utilities.batch_copies import copy_of
from lightning_grad.utilities.checks import is_sharded
from lightning_grad.utilities.reporting import listed


def look_at_all(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    training_set: TrainingSet,
    measure: Measure,
    title: str,
    asked: LossRequest = ANY_LOSS,
    dataset: Dataset[Any] | None = None,
    seed: int = 0,
    rehearsal: bool = False,
    one_by_one: bool = False,
) -> dict[str, Tensor]:
    """Measure every sample that training may see, each once, in eval mode.

    Every rank looks at its share; all return the same. A batch that the loader makes ``None``, or for which the step returns
    nothing, is left out, as it is in training.

    Args:
        trainer: The trainer, in a fit.
        pl_module: Its module.
        training_set: The training set.
        measure: Returns some values (B, ...) of the batch by name, nan where a sample has none.
        title: What is shown next to the progress bar.
        asked: What is asked of the losses of the step.
        dataset: Read the samples here instead, at the same indices.
        seed: Seed of the random streams during the pass, so that two of them see the same.
        rehearsal: Look at one batch only, to raise what the pass would raise; what is returned means nothing.
        one_by_one: Look at batches of one sample.

    Raises:
        ValueError: If the other data set has another length, or there are fewer samples than ranks, or no batch has a value.

    Returns:
        dict: For each name the values of the whole data set, (n, ...), float64, on the CPU; nan where not looked at or not
        finite.
    """
    _refuse_data(trainer, training_set, dataset, asked.display_name)
    chunks, batches = _share_of_rank(trainer, training_set, rehearsal, one_by_one)
    loader = scoring_loader(training_set, dataset, batches, seed, in_main_process=rehearsal)
    total, memory, collate = training_set.sampler.total, dict[str, Any](), training_set.loader.collate_fn
    found = _Found(total, trainer.strategy.root_device, asked)
    looking = quiet(trainer, pl_module, advice=f", or {asked.way_out}", display_name=asked.display_name)
    with looking, generators_kept([loader.dataset, collate]), numbers_kept(collate):
        seed_streams(seed)
        for number, batch in enumerate(loader if rehearsal else _with_progress(loader, title, trainer)):
            if batch is None:
                continue
            batch = to_device(trainer, batch)
            run = runner(trainer, pl_module, batch, number, None if training_set.is_whole_batch else asked)
            look = Look(pl_module, batch, batches[number], total, run, asked, memory)
            with torch.no_grad():
                if number >= len(chunks):
                    run()
                elif found.measure(look, measure) and rehearsal:
                    break
    values = found.values if rehearsal else found.over_ranks(trainer)
    may_have_some = bool(values) or len(batches) < len(chunks)
    if not trainer.strategy.reduce_boolean_decision(may_have_some, all=False):  # a single rank's share may have none
        raise ValueError(
            f"{asked.display_name} found nothing to look at: each batch was None, or training_step returned None for it. Let "
            "collate_fn and training_step return something for some batches in eval mode."
        )
    return values


def _refuse_data(
    trainer: pl.Trainer, training_set: TrainingSet, dataset: Dataset[Any] | None, display_name: str
) -> None:
    if dataset is not None and len(dataset) != training_set.sampler.total:  # type: ignore[arg-type]
        raise ValueError(
            f"{display_name}(score_dataset=...) must return the training set's own {training_set.sampler.total} samples, "
            f"without augmentation; got {len(dataset)}. "  # type: ignore[arg-type]
            "Return the same samples in the same order."
        )
    samples = len(training_set.sampler.population)
    if samples < trainer.world_size:
        raise ValueError(
            f"{display_name} cannot share {samples} samples among {trainer.world_size} ranks. Use fewer devices."
        )


def _share_of_rank(
    trainer: pl.Trainer, training_set: TrainingSet, rehearsal: bool, one_by_one: bool
) -> tuple[list[list[int]], list[list[int]]]:
    """Return this rank's samples in batches, and the batches that it runs."""
    population, batch_size = training_set.sampler.population, 1 if one_by_one else training_set.sampler.batch_size
    mine = population[trainer.global_rank :: trainer.world_size].tolist()
    chunks = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    # A step may talk to the other ranks, so that all must run it equally often; rank 0 has most samples.
    most = math.ceil(math.ceil(len(population) / trainer.world_size) / batch_size)
    return chunks, chunks[:_TRIES] if rehearsal else [*chunks, *chunks[:1] * (most - len(chunks))]


class _Found:
    """Values by sample, as they come."""

    def __init__(self, total: int, device: torch.device, asked: LossRequest) -> None:
        self._total, self._device, self._asked = total, device, asked
        self.values: dict[str, Tensor] = {}

    def measure(self, look: Look, measure: Measure) -> bool:
        """Keep what is measured of a batch; return whether it has any values."""
        try:
            values = measure(look)
        except SkippedBatchError:
            return False
        for name, value in values.items():
            if len(value) != len(look.indices):
                raise ValueError(
                    f"{self._asked.display_name}: {name} must have a row for each of {len(look.indices)} samples; got "
                    f"{tuple(value.shape)}. Let collate_fn keep one row a sample, or {self._asked.way_out}."
                )
            own = self._table(name, value.shape[1:])
            value = value.detach().to(own)
            own[torch.tensor(look.indices, device=own.device)] = value.masked_fill(~value.isfinite(), float("nan"))
        return True

    def _table(self, name: str, shape: Sequence[int]) -> Tensor:
        """Return where the values of a name are kept, nan at first; ``shape`` is that of one sample's."""
        if name not in self.values:
            # Vectors of ImageNet's samples are gigabytes; what no float64 holds, Apple's GPU has no use for.
            kind = torch.float32 if shape or self._device.type == "mps" else torch.float64
            self.values[name] = torch.full((self._total, *shape), float("nan"), dtype=kind, device=self._device)
        return self.values[name]

    def over_ranks(self, trainer: pl.Trainer) -> dict[str, Tensor]:
        shapes = first_of_ranks(trainer, {name: tuple(value.shape[1:]) for name, value in self.values.items()})
        return {
            name: mean_over_ranks(trainer, self._table(name, shape)).double().cpu() for name, shape in shapes.items()
        }


def say_what_is_skipped(display_name: str, population: Tensor, has_value: Tensor) -> None:
    """Print how many samples have no value, and which.

    Args:
        display_name: Who looked.
        population: Indices of the samples that training may see.
        has_value: Whether each has one, in the same order.
    """
    missing = population[~has_value].tolist()
    if missing:
        shown = listed(missing, _SHOWN)
        rank_zero_info(
            f"{display_name} skips {len(missing)} of {len(population)} samples that have no finite value: {shown}. Their "
            "batch was None, or training_step returned None for it, or none of their positions counts, or their loss is "
            "not finite."
        )


_TRIES = 8  # batches, until one has a value
_SHOWN = 8  # indices


def scoring_loader(
    training_set: TrainingSet,
    dataset: Any,
    chunks: list[list[int]],
    seed: int,
    in_main_process: bool,
    collate: Any = None,
) -> DataLoader[Any] | BorrowedWorkers:
    """Return a loader of given samples that is otherwise as the training loader, or has another ``collate_fn``."""
    loader = training_set.loader
    is_own = dataset is None or dataset is loader.dataset
    if not in_main_process and is_own and training_set.has_idle_workers:
        return BorrowedWorkers(loader, chunks, seed)
    workers: dict[str, Any] = {}
    if not in_main_process:
        names = ("num_workers", "timeout", "worker_init_fn", "multiprocessing_context", "prefetch_factor")
        workers = {name: getattr(loader, name) for name in names}
    return indexed_loader(loader, dataset, chunks, seed, collate, **workers)


def indexed_loader(
    loader: DataLoader[Any], dataset: Any, chunks: list[list[int]], seed: int, collate: Any = None, **workers: Any
) -> DataLoader[Any]:
    """Return a loader of given samples, of its own data set unless another is given, that is otherwise as ``loader``."""
    # With batch_size=None the data set itself takes lists of indices.
    batches: dict[str, Any] = {"batch_sampler": chunks}
    if loader.batch_sampler is None:
        batches = {"batch_size": None, "sampler": chunks}
    return DataLoader(
        loader.dataset if dataset is None else dataset,
        **batches,
        collate_fn=collate or loader.collate_fn,
        pin_memory=loader.pin_memory,
        generator=torch.Generator().manual_seed(seed),
        **workers,
    )


def _with_progress(loader: DataLoader[Any] | BorrowedWorkers, title: str, trainer: pl.Trainer) -> Iterator[Any]:
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
    # Its iterator, and not the loader: tqdm would iterate twice, and start workers twice.
    yield from tqdm(iter(loader), desc=title, total=len(loader), leave=False, disable=not shown)


def to_device(trainer: pl.Trainer, batch: Any) -> Any:
    """Return a batch as ``training_step`` would get it."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def runner(
    trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, number: int = 0, partly: LossRequest | None = None
) -> Callable[[], object]:
    """Return what runs ``training_step`` on a copy of a batch, as often as it is called.

    Args:
        trainer: The trainer.
        pl_module: Its module.
        batch: The batch.
        number: Its number.
        partly: Given where the batch is that of one of several loaders, on which the step cannot be run: who asks.
    """
    arguments = list(trainer.fit_loop.epoch_loop._build_kwargs(OrderedDict(), batch, number).values())

    def run() -> object:
        if partly is not None:
            raise ValueError(
                f"{partly.display_name} cannot run training_step on the samples of one loader, because it takes a batch "
                f"of each of several training loaders. To act on one of them, {partly.way_out}."
            )
        # A step may write into what it gets. The gradient by an input must reach the batch's own.
        shown = copy_of(arguments, leaves_in_graph=True)
        if is_sharded(trainer):
            return trainer.strategy.training_step(*shown)
        context: AbstractContextManager[Any] = trainer.precision_plugin.train_step_context() or nullcontext()
        with context:
            return pl_module.training_step(*shown)

    return run
