"""Running batches of a training set in a quiet module, in an order of their samples, to see what the step makes of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_grad.core.losses.given_functions import SCORE_FN, GivenFunction
from lightning_grad.core.losses.look import Look, Measure, SkippedBatchError
from lightning_grad.core.losses.row_order import Seen, largest, rows_of_call, rows_of_terms, size_of_input
from lightning_grad.core.losses.sample_losses import SampleLosses, loss_of_output
from lightning_grad.core.losses.scoring import runner, scoring_loader, to_device
from lightning_grad.core.quiet import quiet
from lightning_grad.core.samples.training_set import TrainingSet
from lightning_grad.data.random_streams import generators_kept, numbers_kept, seed_generators, seed_streams
from lightning_grad.utilities.batch_copies import copy_of
from lightning_grad.utilities.batches import reordered


@dataclass
class BatchRuns:
    """Runs batches of a training set without a trace, for a technique that wants to know something before it begins.

    Args:
        trainer: The trainer, in a fit.
        pl_module: Its module.
        label: Who asks, for errors.
        which: Which loss of the step counts, whatever else it computes.
        way_out: What to do about a loss that cannot be seen, as a clause that begins with a verb.
        measure: What is measured of a batch in place of its loss.
        runs_the_step: Whether the step may be run at all; else only the tensors of the batch are compared.
        by_terms: Whether the loss of each sample is all that has to be known, so that it may come from several terms.
        loss_fn: Gives the losses of the samples in place of the step.
        outputs_fn: Gives logits and labels in place of the step.
        by_classes: Whether only logits and classes matter, so that other terms may be added to the loss that classifies.
    """

    trainer: pl.Trainer
    pl_module: pl.LightningModule
    label: str
    which: int | None = None
    way_out: str = SCORE_FN
    measure: Measure | None = None
    runs_the_step: bool = True
    by_terms: bool = False
    loss_fn: GivenFunction | None = None
    outputs_fn: GivenFunction | None = None
    by_classes: bool = False

    @contextmanager
    def _quiet(self, seed: int) -> Iterator[None]:
        looking = quiet(self.trainer, self.pl_module, advice=f", or {self.way_out}", label=self.label)
        with looking, torch.no_grad():
            self._seed(seed)
            yield

    def _seed(self, seed: int) -> None:
        seed_streams(seed)
        for module in self.pl_module.modules():
            seed_generators(module, seed, depth=1)  # no further: the module knows its Trainer

    @contextmanager
    def loaded(
        self, training_set: TrainingSet, dataset: Any, indices: list[int], order: Tensor, seed: int
    ) -> Iterator[Any]:
        """Give the batch of some samples, as ``collate_fn`` makes it of them in an order, in a quiet module."""
        loader = training_set.loader
        takes_lists = loader.batch_sampler is None  # the data set makes the batch of a list of indices
        chosen = [indices[place] for place in order.tolist()] if takes_lists else indices

        def collate(items: Any) -> Any:
            seed_streams(seed)  # the items are read with the same random numbers each time, in the same order
            seed_generators(loader.collate_fn, seed)
            return loader.collate_fn(items if takes_lists else [items[place] for place in order.tolist()])

        once = scoring_loader(training_set, dataset, [chosen], 0, in_main_process=True, collate=collate)
        own = [once.dataset, loader.collate_fn]
        with generators_kept(own), numbers_kept(loader.collate_fn), self._quiet(0):
            batch = next(iter(once))
            self._seed(seed)
            yield batch

    def _run(self, batch: Any, samples: int, memory: dict[str, Any], seen: Seen) -> Seen | None:
        run = runner(self.trainer, self.pl_module, batch, 0)
        look = Look(
            self.pl_module,
            batch,
            list(range(samples)),
            samples,
            run,
            memory,
            self.which,
            self.label,
            self.way_out,
            loss_fn=self.loss_fn,
            outputs_fn=self.outputs_fn,
            by_classes=self.by_classes,
        )
        try:
            if self.measure is not None:
                seen.values = dict(self.measure(look))
                return seen
            if self.loss_fn is not None:
                seen.values = {"loss": look.losses().losses.detach()}
                return seen
            found = look.losses() if self.by_terms else SampleLosses(Tensor(), look.loss())
        except SkippedBatchError:
            return None
        if found.call is not None:
            seen.values = rows_of_call(found.call)
            floor = (1e-2 if self._is_coarse else 1e-4) * size_of_input(found.call)
            seen.floors = {"value": floor, "input": floor}
        else:
            assert found.terms is not None
            seen.terms, seen.values = found.terms, rows_of_terms(found.terms)
            exactness = 5e-2 if self._is_coarse else 1e-3
            seen.floors = {name: exactness * largest(rows) for name, rows in seen.values.items()}
        return seen

    def _alone(self, training_set: TrainingSet, dataset: Any, index: int, strict: bool = False) -> Tensor | None:
        try:
            with self.loaded(training_set, dataset, [index], torch.arange(1), 0) as batch:
                return self._loss_alone(to_device(self.trainer, batch))
        except Exception as error:  # a batch of one may be impossible: a deviation over the batch, a squeeze
            if not strict:
                return None
            raise RuntimeError(
                f"{self.label} would run training_step on one sample at a time, and it fails on the sample {index} alone: "
                f"{type(error).__name__}: {error}. Let it run on batches of one, or {self.way_out}."
            ) from error

    def _row_alone(self, batch: Any, samples: int, row: int) -> Tensor | None:
        try:
            with self._quiet(0):
                return self._loss_alone(reordered(copy_of(batch), torch.tensor([row]), samples))
        except Exception:  # as above, or rows that are not one a sample
            return None

    def _loss_alone(self, batch: Any) -> Tensor | None:
        with torch.enable_grad():  # a step may differentiate
            loss = loss_of_output(runner(self.trainer, self.pl_module, batch, 0)())
        return None if loss is None or loss.numel() != 1 else loss.detach().reshape(())

    @property
    def _function(self) -> str:
        """The argument that takes the place of the step; empty if none does."""
        given = {"score_fn": self.measure, "loss_fn": self.loss_fn, "outputs_fn": self.outputs_fn}
        return next((name for name, function in given.items() if function is not None), "")

    @property
    def _is_coarse(self) -> bool:
        return "16" in str(self.trainer.precision)
