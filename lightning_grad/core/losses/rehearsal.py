"""The rehearsal: check on one batch that rows of losses belong to the samples that a technique credits with them.

Row b of a batch, of a loss or of scores is credited to the b-th sample that was drawn. A
``collate_fn`` that sorts, or a step that concatenates two views, breaks this silently. So the
samples of one batch are run in other orders, in eval mode and without a trace, and the results must
follow the order. If they do not, the technique raises an error: it cannot correct the order, which
depends on the data and differs from batch to batch.

``row_order.py`` compares the rows.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_grad.core.losses import row_order
from lightning_grad.core.losses.given_functions import LossRequest, SampleLoss, checked_losses, refuse_other_means
from lightning_grad.core.losses.look import Look, Measure, SkippedBatchError
from lightning_grad.core.losses.sample_losses import SampleLosses, loss_of_output, only_loss, refuse_rest
from lightning_grad.core.losses.scoring import runner, scoring_loader, to_device
from lightning_grad.core.quiet import eager, quiet
from lightning_grad.core.ranks import sum_over_ranks
from lightning_grad.core.samples.training_set import TrainingSet
from lightning_grad.data.random_streams import generators_kept, numbers_kept, seed_generators, seed_streams
from lightning_grad.functional.gradients.whole_loss import WholeLossCapture
from lightning_grad.utilities.batch_copies import copy_of
from lightning_grad.utilities.batches import reordered
from lightning_grad.utilities.checks import is_sharded

_ALONE = 16  # number of samples that are run in batches of one
_DRAWS = 4  # number of batches to try until one has a loss
_KINDS: tuple[SampleLoss, SampleLoss] = ("share", "own")


@dataclass
class Rehearsal:
    """Runs one batch of a training set in several orders, and raises if rows do not follow their samples.

    Args:
        trainer: The trainer, during a fit.
        pl_module: Its module.
        asked: Requirements on the losses of the step.
        training_set: The training set. Without it, only :meth:`check_batch` and
            :meth:`check_whole_loss` can be called.
        dataset: Data set to read the samples from instead, at the same indices.
        measure: Measure to check instead of the loss.
        runs_the_step: Whether the step may be run; if not, only the tensors of the batch are
            compared.
        by_terms: Whether only the loss of each sample is needed, which may then come from several
            terms.

    Attributes:
        kind: Definition of a sample's loss that comes from several terms: the one that equals the
            sample's loss in a batch of one. ``None`` if neither does.
    """

    trainer: pl.Trainer
    pl_module: pl.LightningModule
    asked: LossRequest
    training_set: TrainingSet | None = None
    dataset: Any = None
    measure: Measure | None = None
    runs_the_step: bool = True
    by_terms: bool = False
    kind: SampleLoss = field(default=None, init=False)

    def __post_init__(self) -> None:
        given = {"score_fn": self.measure, "loss_fn": self.asked.loss_fn, "outputs_fn": self.asked.outputs_fn}
        # Name of the argument that replaces the step; empty if there is none.
        self._function = next((name for name, function in given.items() if function is not None), "")
        self._is_coarse = "16" in str(self.trainer.precision)
        self._exactness = 5e-2 if self._is_coarse else 1e-3
        self._rows = row_order.RowComparison(self.asked, self._exactness, self._function)

    def check_loader(self, in_training: bool = False) -> None:
        """Check the rows of batches that ``collate_fn`` builds from the training set's samples.

        Args:
            in_training: Whether losses are read in training, so that the loss in training mode is
                checked too.

        Raises:
            RuntimeError: If rows do not follow the samples, or only a part of the loss is captured.
        """
        training_set = self._samples
        if training_set.loader.batch_sampler is None:
            self._rows.maker = "the data set"  # it takes lists of indices
        runs = self._function != "" or (self.runs_the_step and training_set.is_whole_batch)
        size = min(training_set.sampler.batch_size, len(training_set.sampler.population) // self.trainer.world_size)
        if not size:
            return
        mine, memory = self.mine, dict[str, Any]()
        for draw in range(_DRAWS):
            chosen = torch.randperm(len(mine), generator=torch.Generator().manual_seed(draw))[:size]
            indices = mine[chosen].tolist()

            def see(order: Tensor, seed: int, indices: list[int] = indices) -> row_order.Seen | None:
                with self.loaded(indices, order, seed) as batch:
                    if batch is None:
                        return None
                    seen = row_order.Seen(row_order.rows_of_batch(batch, size))
                    return self._run(to_device(self.trainer, batch), size, memory, seen) if runs else seen

            if self._rows.compare(see, size):
                if "terms" in memory:
                    alone = [self._alone(index) for index in indices[:_ALONE]]
                    self.kind = self._kind_of(see(torch.arange(size), 0), alone)
                elif in_training and runs:
                    with self.loaded(indices) as batch:
                        batch = None if batch is None else to_device(self.trainer, batch)
                    if batch is not None:
                        self.check_whole_loss(batch, size)
                return
        rank_zero_warn(
            f"{self.asked.display_name} cannot check that rows follow the samples, because {_DRAWS} batches in a row "
            "had no loss. Make collate_fn and training_step return something for more batches."
        )

    def _kind_of(self, whole: row_order.Seen | None, alone: list[Tensor | None]) -> SampleLoss:
        """Return the definition of a sample's loss that equals the step's loss in a batch of one.

        Args:
            whole: Rows of the whole batch.
            alone: Losses of the step for its first samples alone.
        """
        if whole is None or whole.terms is None or None in alone:
            fits = [False, False]
        else:
            terms, solo = whole.terms, torch.stack([loss for loss in alone if loss is not None])
            own, shares = (values.detach()[: len(solo)] for values in (terms.own, terms.shares))
            solo = solo.to(own) - terms.constant
            known = own.isfinite() & solo.isfinite()
            floor = self._exactness * row_order.largest(solo[known])
            fits = [row_order.is_close(values[known], solo[known], self._exactness, floor) for values in (shares, own)]
        flags = torch.tensor(fits, dtype=torch.float32, device=self.trainer.strategy.root_device)
        ranks = sum_over_ranks(self.trainer, flags).tolist()  # all ranks must choose the same
        return next((kind for kind, count in zip(_KINDS, ranks, strict=True) if count == self.trainer.world_size), None)

    def check_means(
        self, means: Callable[[list[int]], float], name: str, with_constant: bool = True, most: int | None = None
    ) -> None:
        """Raise unless the mean over losses of samples is the loss of the step, on two batches.

        Args:
            means: Function (indices) -> mean loss of these samples.
            name: Source of the losses, for errors.
            with_constant: Whether the two may differ by a constant.
            most: Largest number of samples in a batch.

        Raises:
            ValueError: If they differ.
        """
        mine = self.mine
        size = min(self._samples.sampler.batch_size, max(1, len(mine) // 2), most or len(mine))
        pairs: list[tuple[float, float]] = []
        for start in range(0, min(len(mine), 2 * _DRAWS * size), size):
            indices = mine[start : start + size].tolist()
            loss = self._loss_of(indices)
            mean = float("nan") if loss is None else means(indices)
            if loss is not None and bool(loss.isfinite()):
                pairs.append((mean, float(loss)))
            if len(pairs) == 2:
                break
        # At the start of a run all losses, and so all means, are similar: the tolerance must be
        # small. GPUs round products coarsely (TF32), so theirs is larger.
        is_fine = self.trainer.strategy.root_device.type == "cpu" and not self._is_coarse
        exactness, advice = 1e-4 if is_fine else self._exactness, "" if self.asked.loss_fn else self.asked.advice
        refuse_other_means(pairs, self.asked.display_name, name, exactness, with_constant, advice)

    def check_function(self) -> None:
        """Raise unless the mean of ``loss_fn`` equals the loss of the step up to a constant.

        Raises:
            ValueError: If it does not.
        """

        def mean(indices: list[int]) -> float:
            assert self.asked.loss_fn is not None
            with self.loaded(indices) as batch:
                found = self.asked.loss_fn(self.pl_module, to_device(self.trainer, batch))
                return float(checked_losses(found, len(indices)).detach().mean())

        self.check_means(mean, "loss_fn")

    def check_alone(self, most: int | None = None) -> None:
        """Raise unless the losses of single samples average to the losses of batches.

        Args:
            most: Largest number of samples in a batch.

        Raises:
            ValueError: If they do not.
            RuntimeError: If the step cannot be run on one sample.
        """

        def mean(indices: list[int]) -> float:
            losses = [self._alone(index, strict=True) for index in indices]
            known = [float(loss) for loss in losses if loss is not None and loss.isfinite()]
            return sum(known) / len(known) if known else float("nan")

        self.check_means(mean, "batches of one (scores_by='sample')", with_constant=False, most=most)

    def check_batch(self, batch: Any, samples: int) -> bool:
        """Check that adjacent rows of a loss belong to one sample; return True if the batch has a loss.

        This is for techniques that credit nothing to sample indices: the order of the samples does
        not matter.

        Raises:
            RuntimeError: If adjacent rows belong to different samples.
        """
        memory: dict[str, Any] = {}

        def see(order: Tensor, seed: int) -> row_order.Seen | None:
            with self._quiet(seed):
                return self._run(reordered(copy_of(batch), order), samples, memory, row_order.Seen())

        if not self._rows.compare(see, samples, in_order=False):
            return False
        if "terms" in memory:
            alone = [self._row_alone(batch, samples, row) for row in range(min(samples, _ALONE))]
            self.kind = self._kind_of(see(torch.arange(samples), 0), alone)
        return True

    def check_whole_loss(self, batch: Any, samples: int | None) -> None:
        """Run the step on a batch in training mode, and raise if only a part of its loss is captured.

        Raises:
            RuntimeError: In that case, or if the step changes a parameter.
        """
        asked = self.asked
        if asked.loss_index is not None:
            return
        looking = quiet(
            self.trainer,
            self.pl_module,
            evaluate=False,
            advice=f", or {asked.way_out}",
            display_name=asked.display_name,
        )
        with looking, eager(), torch.enable_grad():
            capture = WholeLossCapture(self.pl_module, samples, way_out=asked.way_out)
            with capture:
                output = runner(self.trainer, self.pl_module, batch)()
            if output is not None:
                try:
                    call = only_loss(capture, asked)
                    refuse_rest(capture, call, output, asked)
                except (RuntimeError, ValueError):
                    if self.by_terms and not is_sharded(self.trainer):
                        return  # the loss has several terms, which have been checked already
                    raise
                self._rows.refuse_moved(self._rows.targets, row_order.rows_of_call(call).get("target"), "target")

    # A batch is run.

    @contextmanager
    def _quiet(self, seed: int) -> Iterator[None]:
        looking = quiet(
            self.trainer, self.pl_module, advice=f", or {self.asked.way_out}", display_name=self.asked.display_name
        )
        with looking, torch.no_grad():
            self._seed(seed)
            yield

    def _seed(self, seed: int) -> None:
        seed_streams(seed)
        for module in self.pl_module.modules():
            seed_generators(module, seed, depth=1)  # no deeper: the module refers to its Trainer

    @contextmanager
    def loaded(self, indices: list[int], order: Tensor | None = None, seed: int = 0) -> Iterator[Any]:
        """Yield the batch of some samples in an order, as built by ``collate_fn``, in a quiet module."""
        loader, places = self._samples.loader, range(len(indices)) if order is None else order.tolist()
        takes_lists = loader.batch_sampler is None  # the data set builds the batch from a list of indices
        chosen = [indices[place] for place in places] if takes_lists else indices

        def collate(items: Any) -> Any:
            # Only the order given to collate_fn changes: the items are always read in the same
            # order, with the same random numbers.
            seed_streams(seed)
            seed_generators(loader.collate_fn, seed)
            return loader.collate_fn(items if takes_lists else [items[place] for place in places])

        once = scoring_loader(self._samples, self.dataset, [chosen], 0, in_main_process=True, collate=collate)
        own = [once.dataset, loader.collate_fn]
        with generators_kept(own), numbers_kept(loader.collate_fn), self._quiet(0):
            batch = next(iter(once))
            self._seed(seed)
            yield batch

    @property
    def _samples(self) -> TrainingSet:
        assert self.training_set is not None
        return self.training_set

    @property
    def mine(self) -> Tensor:
        """Indices of this rank's samples."""
        return self._samples.sampler.population[self.trainer.global_rank :: self.trainer.world_size]

    def _run(self, batch: Any, samples: int, memory: dict[str, Any], seen: row_order.Seen) -> row_order.Seen | None:
        """Run the step, or the function that replaces it, and add its rows to ``seen``; ``None`` without a loss."""
        run = runner(self.trainer, self.pl_module, batch)
        look = Look(self.pl_module, batch, list(range(samples)), samples, run, self.asked, memory)
        try:
            if self.measure is not None:
                seen.values = dict(self.measure(look))
                return seen
            if self.asked.loss_fn is not None:
                seen.values = {"loss": look.losses().losses.detach()}
                return seen
            found = look.losses() if self.by_terms else SampleLosses(Tensor(), look.loss())
        except SkippedBatchError:
            return None
        if found.call is not None:
            seen.values = row_order.rows_of_call(found.call)
            floor = (1e-2 if self._is_coarse else 1e-4) * row_order.size_of_input(found.call)
            seen.floors = {"value": floor, "input": floor}
        else:
            assert found.terms is not None
            seen.terms, seen.values = found.terms, row_order.rows_of_terms(found.terms)
            seen.floors = {name: self._exactness * row_order.largest(rows) for name, rows in seen.values.items()}
        return seen

    def _loss_of(self, indices: list[int]) -> Tensor | None:
        with self.loaded(indices) as batch:
            return None if batch is None else self._loss_alone(to_device(self.trainer, batch))

    def _alone(self, index: int, strict: bool = False) -> Tensor | None:
        try:
            return self._loss_of([index])
        except Exception as error:  # a batch of one may be impossible, for example with batch statistics or squeeze()
            if not strict:
                return None
            raise RuntimeError(
                f"{self.asked.display_name} must run training_step on one sample at a time, but it fails on sample "
                f"{index} alone: {type(error).__name__}: {error}. Make it run on batches of one, or "
                f"{self.asked.way_out}."
            ) from error

    def _row_alone(self, batch: Any, samples: int, row: int) -> Tensor | None:
        try:
            with self._quiet(0):
                return self._loss_alone(reordered(copy_of(batch), torch.tensor([row]), samples))
        except Exception:  # as above, or the batch does not have one row per sample
            return None

    def _loss_alone(self, batch: Any) -> Tensor | None:
        with torch.enable_grad():  # the step may differentiate something itself
            loss = loss_of_output(runner(self.trainer, self.pl_module, batch)())
        return None if loss is None or loss.numel() != 1 else loss.detach().reshape(())
