"""Measure every sample of a training set through the module's own ``training_step``, without a trace.

:func:`look_at_all` runs the pass; a measure is a function of a :class:`~.look.Look` at one batch.
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
from lightning_grad.functional import PerSampleGradientNorms
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
    memory: dict[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Measure each sample of the training set once, in eval mode.

    Every rank measures its share, and all return the same values. A batch that the loader collates
    to ``None``, or for which the step returns ``None``, is skipped, as in training.

    Args:
        trainer: The trainer, during a fit.
        pl_module: Its module.
        training_set: The training set.
        measure: Function (look) -> values (B, ...) of the batch by name, nan for samples without a
            value.
        title: Title of the progress bar.
        asked: Requirements on the losses of the step.
        dataset: Data set to read the samples from instead, at the same indices.
        seed: Seed of the random streams during the pass, so that every pass draws the same numbers.
        rehearsal: Measure only one batch, to raise errors early. The returned values are
            meaningless.
        one_by_one: Measure batches of one sample.
        memory: A dictionary that all passes over this module share, which keeps what gradient norms
            learned of the network. They learn it again when the network has changed.

    Raises:
        ValueError: If the other data set has another length, there are fewer samples than ranks, or
            no batch has a value.

    Returns:
        dict: For each name, the values of the whole data set, (n, ...), float64, on the CPU; nan
            for samples that were not measured or whose value is not finite.
    """
    _refuse_data(trainer, training_set, dataset, asked.display_name)
    chunks, batches = _share_of_rank(trainer, training_set, rehearsal, one_by_one)
    loader = scoring_loader(training_set, dataset, batches, seed, in_main_process=rehearsal)
    total, collate = training_set.sampler.total, training_set.loader.collate_fn
    memory = _of_earlier_passes({} if memory is None else memory)
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
    if not trainer.strategy.reduce_boolean_decision(may_have_some, all=False):  # one rank's share may have none
        raise ValueError(
            f"{asked.display_name} found nothing to measure: every batch was None, or training_step returned None for "
            "it. Make collate_fn and training_step return something for some batches in eval mode."
        )
    return values


def _of_earlier_passes(memory: dict[str, Any]) -> dict[str, Any]:
    """Forget everything but the gradient norms, which check what they know: the loss may have changed."""
    norms: PerSampleGradientNorms | None = memory.get("norms")
    memory.clear()
    if norms is not None:
        norms.begin_pass()
        memory["norms"] = norms
    return memory


def _refuse_data(
    trainer: pl.Trainer, training_set: TrainingSet, dataset: Dataset[Any] | None, display_name: str
) -> None:
    if dataset is not None and len(dataset) != training_set.sampler.total:  # type: ignore[arg-type]
        raise ValueError(
            f"{display_name}(score_dataset=...) must return the {training_set.sampler.total} samples of the training set, "
            f"without augmentation; got {len(dataset)} samples. "  # type: ignore[arg-type]
            "Return the same samples in the same order."
        )
    samples = len(training_set.sampler.population)
    if samples < trainer.world_size:
        raise ValueError(
            f"{display_name} cannot split {samples} samples among {trainer.world_size} ranks. Use fewer devices."
        )


def _share_of_rank(
    trainer: pl.Trainer, training_set: TrainingSet, rehearsal: bool, one_by_one: bool
) -> tuple[list[list[int]], list[list[int]]]:
    """Return this rank's samples in batches, and the batches that it runs, which may repeat the first one."""
    population, batch_size = training_set.sampler.population, 1 if one_by_one else training_set.sampler.batch_size
    mine = population[trainer.global_rank :: trainer.world_size].tolist()
    chunks = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    # A step may communicate with other ranks, so all ranks must run it equally often; rank zero has
    # most samples.
    most = math.ceil(math.ceil(len(population) / trainer.world_size) / batch_size)
    return chunks, chunks[:_TRIES] if rehearsal else [*chunks, *chunks[:1] * (most - len(chunks))]


class _Found:
    """Values by sample, collected batch by batch."""

    def __init__(self, total: int, device: torch.device, asked: LossRequest) -> None:
        self._total, self._device, self._asked = total, device, asked
        self.values: dict[str, Tensor] = {}

    def measure(self, look: Look, measure: Measure) -> bool:
        """Measure a batch and store its values; return False if the step skipped the batch."""
        try:
            values = measure(look)
        except SkippedBatchError:
            return False
        for name, value in values.items():
            if len(value) != len(look.indices):
                raise ValueError(
                    f"{self._asked.display_name}: {name} must have one row for each of {len(look.indices)} samples; "
                    f"got shape {tuple(value.shape)}. Make collate_fn keep one row per sample, or "
                    f"{self._asked.way_out}."
                )
            own = self._table(name, value.shape[1:])
            value = value.detach().to(own)
            own[torch.tensor(look.indices, device=own.device)] = value.masked_fill(~value.isfinite(), float("nan"))
        return True

    def _table(self, name: str, shape: Sequence[int]) -> Tensor:
        """Return the table of a quantity, filled with nan at first; ``shape`` is the shape of one sample's value."""
        if name not in self.values:
            # float32 for vectors, which take gigabytes for ImageNet, and on Apple's GPU, which has
            # no float64.
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
        display_name: Name of the technique.
        population: Indices of the samples that training can draw.
        has_value: Whether each has a value, in the same order.
    """
    missing = population[~has_value].tolist()
    if missing:
        shown = listed(missing, _SHOWN)
        rank_zero_info(
            f"{display_name} skips {len(missing)} of {len(population)} samples that have no finite value: {shown}. "
            "Their batch was None, training_step returned None for it, all their positions are ignored, or their "
            "loss is not finite."
        )


_TRIES = 8  # number of batches to try until one has a value
_SHOWN = 8  # number of indices to show


def scoring_loader(
    training_set: TrainingSet,
    dataset: Any,
    chunks: list[list[int]],
    seed: int,
    in_main_process: bool,
    collate: Any = None,
) -> DataLoader[Any] | BorrowedWorkers:
    """Return a loader of the given batches with the settings of the training loader, perhaps another ``collate_fn``."""
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
    """Return a loader of the given batches with the settings of ``loader``; ``dataset=None`` keeps its data set."""
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
    # The iterator, not the loader: tqdm would iterate over the loader twice and start its workers
    # twice.
    yield from tqdm(iter(loader), desc=title, total=len(loader), leave=False, disable=not shown)


def to_device(trainer: pl.Trainer, batch: Any) -> Any:
    """Move a batch to the device and convert it, like Lightning before ``training_step``."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def runner(
    trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, number: int = 0, partly: LossRequest | None = None
) -> Callable[[], object]:
    """Return a function that runs ``training_step`` on a new copy of a batch at each call.

    Args:
        trainer: The trainer.
        pl_module: Its module.
        batch: The batch.
        number: Index of the batch.
        partly: Set it if the batch comes from one of several loaders: the step cannot be run, and
            the function raises.
    """
    arguments = list(trainer.fit_loop.epoch_loop._build_kwargs(OrderedDict(), batch, number).values())

    def run() -> object:
        if partly is not None:
            raise ValueError(
                f"{partly.display_name} cannot run training_step on the samples of one loader, because the step takes "
                f"a batch from each of several training loaders. To use one of them, {partly.way_out}."
            )
        # A copy, because the step may write into its batch. It stays in the graph, so that
        # gradients with respect to inputs reach the tensors of the batch.
        shown = copy_of(arguments, leaves_in_graph=True)
        if is_sharded(trainer):
            return trainer.strategy.training_step(*shown)
        context: AbstractContextManager[Any] = trainer.precision_plugin.train_step_context() or nullcontext()
        with context:
            return pl_module.training_step(*shown)

    return run
