"""What a technique that credits losses to samples shows once, on one batch: that rows follow their samples.

Row b of a batch, of a loss or of scores is taken for the b-th sample that was drawn. A ``collate_fn`` that sorts, or a step
that joins two views, breaks that without a sign. So the samples of one batch are run in other orders, in eval mode and
without a trace, and what comes out must follow them. An order that is found for one batch says nothing of the next, as it
depends on the data: where rows do not follow, the technique refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_grad.core.look import (
    SCORE_FN,
    Look,
    LossFunction,
    Measure,
    SkippedBatchError,
    losses_of,
    only_loss,
    refuse_other_means,
)
from lightning_grad.core.quiet import eager, quiet
from lightning_grad.core.row_order import (
    follows,
    is_close,
    orders_of,
    rows_of_batch,
    rows_of_call,
    rows_of_terms,
    same_rows,
    size_of_input,
)
from lightning_grad.core.sample_losses import SampleLoss, SampleLosses, sum_of_flags
from lightning_grad.core.scoring import runner, scoring_loader, to_device
from lightning_grad.core.training_set import TrainingSet
from lightning_grad.core.whole_step import loss_of_output, refuse_rest
from lightning_grad.data.random_streams import generators_kept, numbers_kept, seed_generators, seed_streams
from lightning_grad.functional._whole_loss import WholeLossCapture
from lightning_grad.functional.gradients import Terms
from lightning_grad.utilities.batch_copies import copy_of
from lightning_grad.utilities.batches import reordered
from lightning_grad.utilities.checks import is_sharded

_EXACT = 1e-5
_NAMES = {"value": "losses", "input": "input of the loss", "target": "target of the loss"}
_ALONE = 16  # samples that are run in batches of one
_DRAWS = 4  # of samples, until a batch of them has a loss
_PUT_BACK = (
    "Put the rows back in the order of the samples before the loss, with all rows of a sample together: "
    "torch.stack([x, x], 1).flatten(0, 1) in place of torch.cat([x, x])"
)
_KEEP = (
    "keep the order of the samples. Where a layer needs them sorted, let training_step sort, and put the rows "
    "back before the loss; pack_padded_sequence(enforce_sorted=False) does both"
)


@dataclass
class Seen:
    """What one run of a batch shows of its samples.

    Args:
        tensors: The tensors of the batch that have a row for each sample.
        values: What the step made of each sample, (B, ...), by name.
        floors: How much of each may be rounding, by name; 0 where it is not named.
        terms: The terms that the values come from, where they are no call.
    """

    tensors: list[Tensor] = field(default_factory=list)
    values: dict[str, Tensor] = field(default_factory=dict)
    floors: dict[str, float] = field(default_factory=dict)
    terms: Terms | None = None


See = Callable[[Tensor, int], Seen | None]


@dataclass
class Rehearsal:
    """Runs one batch of a training set in several orders, and raises where rows do not follow their samples.

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

    Attributes:
        kind: What the loss of a sample alone is, where it comes from several terms; ``None`` if neither fits.
    """

    trainer: pl.Trainer
    pl_module: pl.LightningModule
    label: str
    which: int | None = None
    way_out: str = SCORE_FN
    measure: Measure | None = None
    runs_the_step: bool = True
    by_terms: bool = False
    loss_fn: LossFunction | None = None
    outputs_fn: LossFunction | None = None
    kind: SampleLoss = field(default=None, init=False)
    _maker: str = field(default="collate_fn", init=False)
    _targets: Tensor | None = field(default=None, init=False)  # in eval mode, in order, if nothing random is in them

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
            self._maker = "the data set"  # which takes lists of indices
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
                with self._loaded(training_set, dataset, indices, order, seed) as batch:
                    if batch is None:
                        return None
                    seen = Seen(rows_of_batch(batch, size))
                    return self._run(to_device(self.trainer, batch), size, memory, seen) if runs else seen

            if self._compare(see, size):
                if "terms" in memory:
                    alone = [self._alone(training_set, dataset, index) for index in indices[:_ALONE]]
                    self.kind = self._kind_of(see(torch.arange(size), 0), alone)
                elif in_training and runs:
                    with self._loaded(training_set, dataset, indices, torch.arange(size), 0) as batch:
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
            floor = exactness * _largest(solo[known])
            fits = [is_close(values[known], solo[known], exactness, floor) for values in (shares, own)]
        ranks = sum_of_flags(self.trainer, fits)  # all must take the same
        kinds: tuple[SampleLoss, SampleLoss] = ("share", "own")
        return next((kind for kind, count in zip(kinds, ranks, strict=True) if count == self.trainer.world_size), None)

    def _alone(self, training_set: TrainingSet, dataset: Any, index: int, strict: bool = False) -> Tensor | None:
        try:
            with self._loaded(training_set, dataset, [index], torch.arange(1), 0) as batch:
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

    def check_means(
        self,
        training_set: TrainingSet,
        dataset: Any,
        means: Callable[[list[int]], float],
        name: str,
        with_constant: bool = True,
    ) -> None:
        """Raise unless the mean over single losses is the loss that the step returns, on two batches.

        Args:
            training_set: The training set.
            dataset: Read the samples here instead, at the same indices.
            means: Returns the mean for the samples with these indices.
            name: What the losses come from, for errors.
            with_constant: Whether both may differ by a constant.

        Raises:
            ValueError: If it is not.
        """
        population, world = training_set.sampler.population, self.trainer.world_size
        mine = population[self.trainer.global_rank :: world]
        size = min(training_set.sampler.batch_size, max(1, len(mine) // 2))
        pairs: list[tuple[float, float]] = []
        for start in range(0, min(len(mine), 2 * _DRAWS * size), size):
            indices = mine[start : start + size].tolist()
            with self._loaded(training_set, dataset, indices, torch.arange(len(indices)), 0) as batch:
                loss = None if batch is None else self._loss_alone(to_device(self.trainer, batch))
            mean = float("nan") if loss is None else means(indices)
            if loss is not None and bool(loss.isfinite()):
                pairs.append((mean, float(loss)))
            if len(pairs) == 2:
                break
        # Losses at the start of a run are all alike, and so are means over batches. GPUs round products coarsely (TF32).
        exactness = 1e-4 if self.trainer.strategy.root_device.type == "cpu" else 1e-3
        refuse_other_means(pairs, self.label, name, 5e-2 if self._is_coarse else exactness, with_constant)

    def check_function(self, training_set: TrainingSet, dataset: Any = None) -> None:
        """Raise unless the mean of ``loss_fn`` is the loss of the step up to a constant.

        Raises:
            ValueError: If it is not.
        """

        def mean(indices: list[int]) -> float:
            assert self.loss_fn is not None
            with self._loaded(training_set, dataset, indices, torch.arange(len(indices)), 0) as batch:
                batch = to_device(self.trainer, batch)
                return float(losses_of(self.loss_fn, self.pl_module, batch, len(indices)).detach().mean())

        self.check_means(training_set, dataset, mean, "loss_fn")

    def check_alone(self, training_set: TrainingSet, dataset: Any = None) -> None:
        """Raise unless batches of one sample have the losses of larger ones.

        Raises:
            ValueError: If they have not.
            RuntimeError: If the step cannot be run on one sample.
        """

        def mean(indices: list[int]) -> float:
            losses = [self._alone(training_set, dataset, index, strict=True) for index in indices]
            known = [float(loss) for loss in losses if loss is not None and loss.isfinite()]
            return sum(known) / len(known) if known else float("nan")

        self.check_means(training_set, dataset, mean, "scores_by='sample'", with_constant=False)

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

        if not self._compare(see, samples, in_order=False):
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
                    call = only_loss(capture, self.label)
                    refuse_rest(capture, call, output, self.label, self.way_out)
                except (RuntimeError, ValueError):
                    if self.by_terms and not is_sharded(self.trainer):
                        return  # the step itself was looked at, and has several terms
                    raise
                self._refuse_moved(self._targets, rows_of_call(call).get("target"), "target")

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
    def _loaded(
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
            seen.floors = {name: exactness * _largest(rows) for name, rows in seen.values.items()}
        return seen

    @property
    def _function(self) -> str:
        """The argument that takes the place of the step; empty if none does."""
        given = {"score_fn": self.measure, "loss_fn": self.loss_fn, "outputs_fn": self.outputs_fn}
        return next((name for name, function in given.items() if function is not None), "")

    @property
    def _is_coarse(self) -> bool:
        return "16" in str(self.trainer.precision)

    def _compare(self, see: See, samples: int, in_order: bool = True) -> bool:
        """Return whether there was anything to compare."""
        if samples < 2:
            return True
        first, again = see(torch.arange(samples), 0), see(torch.arange(samples), 1)
        if first is None or again is None:
            return False
        own = (first, again)
        same = {name for name in first.values if self._follow(*own, name, torch.arange(samples), in_order) is not False}
        verdicts: list[bool | None] = []
        if in_order:
            self._targets = first.values["target"] if "target" in same else None
            self._refuse_moved(first.values.get("value"), again.values.get("value"), "value")
        for order in orders_of(samples):
            other = see(order, 0)
            if other is None:
                return False
            tensors = _tensors_follow(first, again, other, order)
            values = _decisive({name: self._follow(first, other, name, order, in_order) for name in same})
            self._judge(tensors, values, in_order)
            verdicts += [*values.values(), *tensors]
        # Each term has to be seen to follow; of a call, what it got and what it made of that tell the same.
        if len(same) < len(first.values) and (first.terms is not None or True not in values.values()):
            self._warn_of_noise(True in verdicts)
        return True

    def _follow(self, first: Seen, other: Seen, name: str, order: Tensor, in_order: bool = True) -> bool | None:
        if name not in other.values:
            return False
        own, others = first.values[name], other.values[name]
        # The network does not compute the targets.
        exactness = (
            (_EXACT, 0.0) if name == "target" else (5e-2 if self._is_coarse else 1e-3, first.floors.get(name, 0.0))
        )
        return follows(own, others, order, *exactness) if in_order else same_rows(own, others, *exactness)

    def _refuse_moved(self, rows: Tensor | None, others: Tensor | None, name: str) -> None:
        """Raise if two runs of the same samples have the same rows in different places, as where a step shuffles them."""
        if rows is None or others is None or is_close(others, rows, 1e-3):
            return
        if same_rows(rows, others, 1e-3):
            self._refuse_step(name, "when the same samples came again")

    def _refuse_step(self, name: str, when: str, in_order: bool = True) -> None:
        taken = "the rows of a loss for the samples of the batch, in their order"
        taken = taken if in_order else "rows of a loss that stand together for one sample"
        raise RuntimeError(
            f"{self.label} takes {taken}, and training_step arranges them otherwise: {when}, the {_NAMES.get(name, name)} did "
            f"not follow. The step may sort, shuffle, join views by torch.cat, or leave out or repeat rows. {_PUT_BACK}. Or "
            f"{self.way_out}."
        )

    def _judge(self, tensors: Sequence[bool | None], values: Mapping[str, bool | None], in_order: bool) -> None:
        wrong = [name for name, follow in values.items() if follow is False]
        # A collate_fn that reorders moves them all; one alone may be no row a sample, and as long as the batch by chance.
        moved = False in tensors and True not in tensors
        if moved and (wrong or True not in values.values()):
            raise RuntimeError(
                f"{self.label} takes row b of a batch for the b-th sample that was drawn, and {self._maker} does not keep "
                f"that order: with the same samples in another order, the rows of its batch did not follow. Let {self._maker} "
                f"{_KEEP}."
            )
        if wrong and self._function:
            what = {"score_fn": "score", "loss_fn": "loss", "outputs_fn": "row"}[self._function]
            several = {"score": "scores", "loss": "losses", "row": "rows"}[what]
            raise RuntimeError(
                f"{self.label} takes {what} b for the b-th sample that was drawn, and when the same samples came in another "
                f"order, the {several} of {self._function} did not follow. Return one {what} for each sample, in the order "
                "of the batch."
            )
        if wrong:
            self._refuse_step(wrong[0], "when the same samples came in another order", in_order)

    def _warn_of_noise(self, tensors_follow: bool) -> None:
        rest = "relies on the tensors of the batch, which do" if tensors_follow else "takes it for granted"
        rank_zero_warn(
            f"{self.label} cannot see whether the rows of the loss follow the samples, because training_step draws random "
            f"numbers in eval mode too; it {rest}. Draw them in training mode only, to have it checked."
        )


def _largest(values: Tensor) -> float:
    return float(values.nan_to_num(0.0).abs().max()) if values.numel() else 0.0


def _decisive(values: Mapping[str, bool | None]) -> dict[str, bool | None]:
    """Return the verdict on the losses, or on what they were computed from if they are all alike or drawn at random."""
    if values.get("value") is not None:
        return {"value": values["value"]}
    return {name: verdict for name, verdict in values.items() if name != "value"}


def _tensors_follow(first: Seen, again: Seen, other: Seen, order: Tensor) -> list[bool | None]:
    """Return for each tensor of the batch whether its rows follow; those that ``collate_fn`` draws at random say nothing."""
    if not len(first.tensors) == len(again.tensors) == len(other.tensors):
        return []
    found = zip(first.tensors, again.tensors, other.tensors, strict=True)
    return [follows(one, two, order, _EXACT) for one, same, two in found if is_close(same, one, _EXACT)]
