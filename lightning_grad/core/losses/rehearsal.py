"""What a technique that credits losses to samples shows once, on one batch: that rows follow their samples.

Row b of a batch, of a loss or of scores is taken for the b-th sample that was drawn. A ``collate_fn`` that sorts, or a step
that joins two views, breaks that without a sign. So the samples of one batch are run in other orders, in eval mode and
without a trace, and what comes out must follow them. An order that is found for one batch says nothing of the next, as it
depends on the data: where rows do not follow, the technique refuses.

``batch_runs.py`` runs the batches, and ``row_order.py`` compares their rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_grad.core.losses.batch_runs import BatchRuns
from lightning_grad.core.losses.given_functions import losses_of, refuse_other_means
from lightning_grad.core.losses.look import only_loss
from lightning_grad.core.losses.row_order import RowComparison, Seen, is_close, largest, rows_of_batch, rows_of_call
from lightning_grad.core.losses.sample_losses import SampleLoss, refuse_rest, sum_of_flags
from lightning_grad.core.losses.scoring import runner, to_device
from lightning_grad.core.quiet import eager, quiet
from lightning_grad.core.samples.training_set import TrainingSet
from lightning_grad.functional.gradients import WholeLossCapture
from lightning_grad.utilities.batch_copies import copy_of
from lightning_grad.utilities.batches import reordered
from lightning_grad.utilities.checks import is_sharded

_ALONE = 16  # samples that are run in batches of one
_DRAWS = 4  # of samples, until a batch of them has a loss


@dataclass
class Rehearsal(BatchRuns):
    """Runs one batch of a training set in several orders, and raises where rows do not follow their samples.

    Its arguments are those of :class:`~lightning_grad.core.losses.batch_runs.BatchRuns`.

    Attributes:
        kind: What the loss of a sample alone is, where it comes from several terms; ``None`` if neither fits.
    """

    kind: SampleLoss = field(default=None, init=False)
    _rows: RowComparison = field(init=False)

    def __post_init__(self) -> None:
        self._rows = RowComparison(self.label, self.way_out, self._is_coarse, self._function)

    def check_loader(self, training_set: TrainingSet, dataset: Any = None, in_training: bool = False) -> None:
        """Check the rows of batches that ``collate_fn`` makes of the training set's samples.

        Args:
            training_set: The training set.
            dataset: Read the samples here instead, at the same indices.
            in_training: Whether losses are read in training, so that those in training mode are looked at too.

        Raises:
            RuntimeError: If rows do not follow the samples, or the loss is seen only in part.
        """
        if training_set.loader.batch_sampler is None:
            self._rows.maker = "the data set"  # which takes lists of indices
        runs = self._function != "" or (self.runs_the_step and training_set.is_whole_batch)
        population, world = training_set.sampler.population, self.trainer.world_size
        size = min(training_set.sampler.batch_size, len(population) // world)
        if not size:
            return
        mine, memory = population[self.trainer.global_rank :: world], dict[str, Any]()
        for draw in range(_DRAWS):
            chosen = torch.randperm(len(mine), generator=torch.Generator().manual_seed(draw))[:size]
            indices = mine[chosen].tolist()

            def see(order: Tensor, seed: int, indices: list[int] = indices) -> Seen | None:
                with self.loaded(training_set, dataset, indices, order, seed) as batch:
                    if batch is None:
                        return None
                    seen = Seen(rows_of_batch(batch, size))
                    return self._run(to_device(self.trainer, batch), size, memory, seen) if runs else seen

            if self._rows.compare(see, size):
                if "terms" in memory:
                    alone = [self._alone(training_set, dataset, index) for index in indices[:_ALONE]]
                    self.kind = self._kind_of(see(torch.arange(size), 0), alone)
                elif in_training and runs:
                    with self.loaded(training_set, dataset, indices, torch.arange(size), 0) as batch:
                        batch = None if batch is None else to_device(self.trainer, batch)
                    if batch is not None:
                        self.check_whole_loss(batch, size)
                return
        rank_zero_warn(
            f"{self.label} cannot see whether rows follow the samples: {_DRAWS} batches in a row had no loss. Let "
            "collate_fn and training_step return something for more batches, to have it checked."
        )

    def _kind_of(self, whole: Seen | None, alone: list[Tensor | None]) -> SampleLoss:
        """Return what the loss of a sample is: that which the step returns for it in a batch of its own.

        Args:
            whole: What a batch shows.
            alone: What the step returns for its first samples alone.
        """
        if whole is None or whole.terms is None or None in alone:
            fits = [False, False]
        else:
            terms, solo = whole.terms, torch.stack([loss for loss in alone if loss is not None])
            own, shares = (values.detach()[: len(solo)] for values in (terms.own, terms.shares))
            solo = solo.to(own) - terms.constant
            known = own.isfinite() & solo.isfinite()
            exactness = 5e-2 if self._is_coarse else 1e-3
            floor = exactness * largest(solo[known])
            fits = [is_close(values[known], solo[known], exactness, floor) for values in (shares, own)]
        ranks = sum_of_flags(self.trainer, fits)  # all must take the same
        kinds: tuple[SampleLoss, SampleLoss] = ("share", "own")
        return next((kind for kind, count in zip(kinds, ranks, strict=True) if count == self.trainer.world_size), None)

    def check_means(
        self,
        training_set: TrainingSet,
        dataset: Any,
        means: Callable[[list[int]], float],
        name: str,
        with_constant: bool = True,
        most: int | None = None,
    ) -> None:
        """Raise unless the mean over single losses is the loss that the step returns, on two batches.

        Args:
            training_set: The training set.
            dataset: Read the samples here instead, at the same indices.
            means: Returns the mean for the samples with these indices.
            name: What the losses come from, for errors.
            with_constant: Whether both may differ by a constant.
            most: Number of samples of a batch at most.

        Raises:
            ValueError: If it is not.
        """
        population, world = training_set.sampler.population, self.trainer.world_size
        mine = population[self.trainer.global_rank :: world]
        size = min(training_set.sampler.batch_size, max(1, len(mine) // 2), most or len(mine))
        pairs: list[tuple[float, float]] = []
        for start in range(0, min(len(mine), 2 * _DRAWS * size), size):
            indices = mine[start : start + size].tolist()
            with self.loaded(training_set, dataset, indices, torch.arange(len(indices)), 0) as batch:
                loss = None if batch is None else self._loss_alone(to_device(self.trainer, batch))
            mean = float("nan") if loss is None else means(indices)
            if loss is not None and bool(loss.isfinite()):
                pairs.append((mean, float(loss)))
            if len(pairs) == 2:
                break
        # Losses at the start of a run are all alike, and so are means over batches. GPUs round products coarsely (TF32).
        exactness = 1e-4 if self.trainer.strategy.root_device.type == "cpu" else 1e-3
        exactness = 5e-2 if self._is_coarse else exactness
        refuse_other_means(pairs, self.label, name, exactness, with_constant, "" if self.loss_fn else self.way_out)

    def check_function(self, training_set: TrainingSet, dataset: Any = None) -> None:
        """Raise unless the mean of ``loss_fn`` is the loss of the step up to a constant.

        Raises:
            ValueError: If it is not.
        """

        def mean(indices: list[int]) -> float:
            assert self.loss_fn is not None
            with self.loaded(training_set, dataset, indices, torch.arange(len(indices)), 0) as batch:
                batch = to_device(self.trainer, batch)
                return float(losses_of(self.loss_fn, self.pl_module, batch, len(indices)).detach().mean())

        self.check_means(training_set, dataset, mean, "loss_fn")

    def check_alone(self, training_set: TrainingSet, dataset: Any = None, most: int | None = None) -> None:
        """Raise unless batches of one sample have the losses of larger ones.

        Args:
            training_set: The training set.
            dataset: Read the samples here instead, at the same indices.
            most: Number of samples that the larger ones have at most.

        Raises:
            ValueError: If they have not.
            RuntimeError: If the step cannot be run on one sample.
        """

        def mean(indices: list[int]) -> float:
            losses = [self._alone(training_set, dataset, index, strict=True) for index in indices]
            known = [float(loss) for loss in losses if loss is not None and loss.isfinite()]
            return sum(known) / len(known) if known else float("nan")

        self.check_means(training_set, dataset, mean, "scores_by='sample'", with_constant=False, most=most)

    def check_batch(self, batch: Any, samples: int) -> bool:
        """Check that the rows of a loss that stand together are those of one sample; return whether there was a loss.

        In which order the samples stand does not matter to who credits no index with anything.

        Raises:
            RuntimeError: If they are not.
        """
        memory: dict[str, Any] = {}

        def see(order: Tensor, seed: int) -> Seen | None:
            with self._quiet(seed):
                return self._run(reordered(copy_of(batch), order), samples, memory, Seen())

        if not self._rows.compare(see, samples, in_order=False):
            return False
        if "terms" in memory:
            alone = [self._row_alone(batch, samples, row) for row in range(min(samples, _ALONE))]
            self.kind = self._kind_of(see(torch.arange(samples), 0), alone)
        return True

    def check_whole_loss(self, batch: Any, samples: int | None) -> None:
        """Run the step on a batch in training mode, and raise if its loss is seen only in part.

        Raises:
            RuntimeError: If it is, or if the step changes a parameter.
        """
        if self.which is not None:
            return
        looking = quiet(self.trainer, self.pl_module, evaluate=False, advice=f", or {self.way_out}", label=self.label)
        with looking, eager(), torch.enable_grad():
            capture = WholeLossCapture(self.pl_module, samples, way_out=self.way_out)
            with capture:
                output = runner(self.trainer, self.pl_module, batch, 0)()
            if output is not None:
                try:
                    call = only_loss(capture, self.label, by_classes=self.by_classes)
                    refuse_rest(capture, call, output, self.label, self.way_out, self.by_classes)
                except (RuntimeError, ValueError):
                    if self.by_terms and not is_sharded(self.trainer):
                        return  # the step itself was looked at, and has several terms
                    raise
                self._rows.refuse_moved(self._rows.targets, rows_of_call(call).get("target"), "target")
