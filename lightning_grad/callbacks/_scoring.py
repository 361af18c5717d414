"""Looking at every sample of a training set through the module's own ``training_step``, without a trace.

:func:`look_at_all` runs the pass; what is measured of a batch is a function of a :class:`Look`.
"""

from __future__ import annotations

import math
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_grad.callbacks._quiet import quiet
from lightning_grad.data.borrowed_workers import BorrowedWorkers
from lightning_grad.data.random_streams import generators_kept
from lightning_grad.functional import LossCall, LossCapture, PerSampleGradientNorms
from lightning_grad.utilities.batches import copy_of
from lightning_grad.utilities.checks import is_sharded
from lightning_grad.utilities.training_set import TrainingSet

Measure = Callable[["Look"], Mapping[str, Tensor]]


@dataclass
class Look:
    """One batch, and the means to see what the module makes of it.

    Args:
        pl_module: The module, in eval mode.
        batch: Its batch, on the device.
        indices: The samples' indices in the data set.
        total: Length of the data set.
        run: Runs ``training_step`` on it.
        memory: What a measure wants to keep from batch to batch.
        which: Which loss of the step, if it has several.
    """

    pl_module: pl.LightningModule
    batch: Any
    indices: list[int]
    total: int
    run: Callable[[], object]
    memory: dict[str, Any] = field(default_factory=dict)
    which: int | None = None

    def loss(self, keep_graph: bool = False) -> LossCall:
        """Run the step and return the call of its loss."""
        which = self.which if self.which is not None else self.memory.get("which")
        capture = self._captured(keep_graph)
        several = len(capture.calls) + len(capture.unread) > 1
        if which is None and several and not any(call.has_graph for call in capture.calls):
            # Only with a graph the loss can be told from what a step computes for its log.
            found = self._captured(with_graph=True)
            which = self.memory["which"] = found.calls.index(found.only())
        return capture.only(which)

    def _captured(self, with_graph: bool) -> LossCapture:
        with_graph = with_graph or bool(self.memory.get("needs_graph"))
        capture = LossCapture(len(self.indices), keep_graph=with_graph)
        try:
            with torch.set_grad_enabled(with_graph), capture:
                self.run()
            return capture
        except RuntimeError:
            if with_graph:
                raise
        # A step that differentiates something itself, as a gradient penalty does, needs a graph.
        found = self._captured(with_graph=True)
        self.memory["needs_graph"] = True
        return found

    def gradient_norms(self) -> tuple[Tensor, LossCall]:
        """Return the norm of every sample's own gradient, and the loss."""
        if "norms" not in self.memory:
            self.memory["norms"] = PerSampleGradientNorms(self.pl_module)
        found: list[LossCall] = []

        def losses() -> Tensor:
            found[:] = [self.loss(keep_graph=True)]
            return found[0].losses

        with torch.enable_grad():
            return self.memory["norms"](losses), found[0]

    def features(self) -> tuple[Tensor, LossCall, nn.Linear]:
        """Return what the last linear layer takes in, the loss of what it gives out, and the layer.

        Raises:
            ValueError: If the logits are not the output of an ``nn.Linear``.
        """
        seen: list[tuple[nn.Linear, Tensor, Tensor]] = []
        layers = [layer for layer in self.pl_module.modules() if isinstance(layer, nn.Linear)]

        def see(layer: nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen.append((layer, args[0], output))

        hooks = [layer.register_forward_hook(see) for layer in layers]
        try:
            call = self.loss()
        finally:
            for hook in hooks:
                hook.remove()
        for layer, taken_in, output in reversed(seen):
            if isinstance(output, Tensor) and output.data_ptr() == call.input.data_ptr():
                return taken_in.detach(), call, layer
        raise ValueError(
            "This score needs the features of the last layer, and the logits of this module are not the output of an "
            "nn.Linear. Use another score, or give score_fn=, which takes the module and a batch and returns the scores."
        )


def look_at_all(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    training_set: TrainingSet,
    measure: Measure,
    title: str,
    dataset: Dataset[Any] | None = None,
    which: int | None = None,
    seed: int = 0,
    rehearsal: bool = False,
) -> dict[str, Tensor]:
    """Measure every sample that training may see, each once, in eval mode.

    Every rank looks at its share; all return the same.

    Args:
        trainer: The trainer, in a fit.
        pl_module: Its module.
        training_set: The training set.
        measure: Returns some values (B, ...) of the batch by name, nan where a sample has none.
        title: What is shown beside the progress bar.
        dataset: Read the samples here instead, at the same indices.
        which: Which loss of the step, if it has several.
        seed: Seed of the random streams during the pass, so that two of them see the same.
        rehearsal: Look at one batch only, to raise what the pass would raise; what is returned means nothing.

    Raises:
        ValueError: If the other data set has another length, or there are fewer samples than ranks.

    Returns:
        dict: For each name the values of the whole data set, (n, ...), float64, on the CPU, nan where not looked at.
    """
    if dataset is not None and len(dataset) != training_set.sampler.total:  # type: ignore[arg-type]
        raise ValueError(
            f"score_dataset must hold the training set's own samples, {training_set.sampler.total}, without augmentation; got "
            f"{len(dataset)}."  # type: ignore[arg-type]
        )
    population, batch_size = training_set.sampler.population, training_set.sampler.batch_size
    if len(population) < trainer.world_size:
        raise ValueError(
            f"{len(population)} samples cannot be shared among {trainer.world_size} ranks. Use fewer devices."
        )
    mine = population[trainer.global_rank :: trainer.world_size].tolist()
    chunks = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    # A step may talk to the other ranks, so that all must run it equally often; rank 0 has most samples.
    most = math.ceil(math.ceil(len(population) / trainer.world_size) / batch_size)
    batches = chunks[:1] if rehearsal else [*chunks, *chunks[:1] * (most - len(chunks))]
    loader = _scoring_loader(training_set, dataset, batches, seed, in_main_process=rehearsal)
    found = _Found(training_set.sampler.total, trainer.strategy.root_device)
    memory: dict[str, Any] = {}
    with quiet(trainer, pl_module, advice=_SCORE_FN), generators_kept([loader.dataset, training_set.loader.collate_fn]):
        _seed_streams(seed)
        for number, batch in enumerate(loader if rehearsal else _with_progress(loader, title, trainer)):
            batch = _to_device(trainer, batch)
            run = _runner(trainer, pl_module, batch, number) if training_set.is_whole_batch else _refuse_part
            look = Look(pl_module, batch, batches[number], training_set.sampler.total, run, memory, which)
            with torch.no_grad():
                if number < len(chunks):
                    found.put(look.indices, measure(look))
                else:
                    run()
    return found.values if rehearsal else found.over_ranks(trainer)


class _Found:
    """Values by sample, as they come."""

    def __init__(self, total: int, device: torch.device) -> None:
        self._total = total
        self._device = device
        self.values: dict[str, Tensor] = {}

    def put(self, indices: list[int], values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            if len(value) != len(indices):
                raise ValueError(
                    f"{name} must have a row for each of {len(indices)} samples; got {tuple(value.shape)}."
                )
            if name not in self.values:
                # Vectors of ImageNet's samples are gigabytes; what no float64 holds, Apple's GPU has no use for.
                kind = torch.float32 if value.dim() > 1 or self._device.type == "mps" else torch.float64
                shape = (self._total, *value.shape[1:])
                self.values[name] = torch.full(shape, float("nan"), dtype=kind, device=self._device)
            own = self.values[name]
            own[torch.tensor(indices, device=own.device)] = value.detach().to(own)

    def over_ranks(self, trainer: pl.Trainer) -> dict[str, Tensor]:
        return {name: merge_ranks(trainer, value).double().cpu() for name, value in self.values.items()}


def merge_ranks(trainer: pl.Trainer, values: Tensor) -> Tensor:
    """Return values (n, ...) of which each rank has some, nan elsewhere; the mean where several ranks have one."""
    if trainer.world_size == 1:
        return values
    known = ~values.isnan()
    total = trainer.strategy.reduce(values.nan_to_num(nan=0.0, posinf=_INFINITE, neginf=-_INFINITE), reduce_op="sum")
    count = trainer.strategy.reduce(known.to(values), reduce_op="sum")
    mean = torch.as_tensor(total) / torch.as_tensor(count)
    return torch.where(mean.abs() > _INFINITE / 1e3, mean.sign() * float("inf"), mean)


_SCORE_FN = ", or pass score_fn=, which takes the module and a batch and returns the scores"
_INFINITE = 1e30  # stands for an infinity in a sum over ranks


def _scoring_loader(
    training_set: TrainingSet, dataset: Any, chunks: list[list[int]], seed: int, in_main_process: bool
) -> DataLoader[Any] | BorrowedWorkers:
    loader = training_set.loader
    is_own = dataset is None or dataset is loader.dataset
    if not in_main_process and is_own and training_set.has_idle_workers:
        return BorrowedWorkers(loader, chunks, seed)
    workers: dict[str, Any] = {}
    if not in_main_process:
        workers = {
            "num_workers": loader.num_workers,
            "timeout": loader.timeout,
            "worker_init_fn": loader.worker_init_fn,
            "multiprocessing_context": loader.multiprocessing_context,
            "prefetch_factor": loader.prefetch_factor,
        }
    # With batch_size=None the data set itself takes lists of indices.
    batches: dict[str, Any] = {"batch_sampler": chunks}
    if loader.batch_sampler is None:
        batches = {"batch_size": None, "sampler": chunks}
    return DataLoader(
        loader.dataset if dataset is None else dataset,
        **batches,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        generator=torch.Generator().manual_seed(seed),
        **workers,
    )


def _seed_streams(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _with_progress(loader: DataLoader[Any] | BorrowedWorkers, title: str, trainer: pl.Trainer) -> Iterator[Any]:
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
    # Its iterator, and not the loader: tqdm would iterate twice, and start workers twice.
    yield from tqdm(iter(loader), desc=title, total=len(loader), leave=False, disable=not shown)


def _to_device(trainer: pl.Trainer, batch: Any) -> Any:
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _refuse_part() -> object:
    raise ValueError(
        "training_step takes a batch of each of several training loaders, so that it cannot be run on the samples of one. "
        "Pass score_fn=, which takes the module and a batch of this loader and returns the scores."
    )


def _runner(trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, number: int) -> Callable[[], object]:
    arguments = trainer.fit_loop.epoch_loop._build_kwargs(OrderedDict(), batch, number).values()
    if is_sharded(trainer):
        return lambda: trainer.strategy.training_step(*copy_of(list(arguments)))

    def run() -> object:
        context: AbstractContextManager[Any] = trainer.precision_plugin.train_step_context() or nullcontext()
        with context:
            return pl_module.training_step(*copy_of(list(arguments)))  # it may write into what it gets, and run again

    return run
