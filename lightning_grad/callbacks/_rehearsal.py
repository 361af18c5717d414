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

from lightning_grad.callbacks._look import SCORE_FN, Look, Measure, SkippedBatchError, only_loss
from lightning_grad.callbacks._quiet import eager, quiet
from lightning_grad.callbacks._row_order import (
    follows,
    is_close,
    orders_of,
    rows_of_batch,
    rows_of_call,
    same_rows,
    size_of_input,
)
from lightning_grad.callbacks._scoring import runner, scoring_loader, to_device
from lightning_grad.callbacks._whole_step import refuse_rest
from lightning_grad.data.random_streams import generators_kept, numbers_kept, seed_generators, seed_streams
from lightning_grad.functional._whole_loss import WholeLossCapture
from lightning_grad.utilities.batch_copies import copy_of
from lightning_grad.utilities.batches import reordered
from lightning_grad.utilities.training_set import TrainingSet

_EXACT = 1e-5
_NAMES = {"value": "losses", "input": "input of the loss", "target": "target of the loss"}
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
        floor: How much of that may be rounding.
    """

    tensors: list[Tensor] = field(default_factory=list)
    values: dict[str, Tensor] = field(default_factory=dict)
    floor: float = 0.0


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
    """

    trainer: pl.Trainer
    pl_module: pl.LightningModule
    label: str
    which: int | None = None
    way_out: str = SCORE_FN
    measure: Measure | None = None
    runs_the_step: bool = True
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
        runs = self.measure is not None or (self.runs_the_step and training_set.is_whole_batch)
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
                if in_training and runs:
                    with self._loaded(training_set, dataset, indices, torch.arange(size), 0) as batch:
                        batch = None if batch is None else to_device(self.trainer, batch)
                    if batch is not None:
                        self.check_whole_loss(batch, size)
                return
        rank_zero_warn(
            f"{self.label} cannot see whether rows follow the samples: {_DRAWS} batches in a row had no loss. Let "
            "collate_fn and training_step return something for more batches, to have it checked."
        )

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

        return self._compare(see, samples, in_order=False)

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
                call = only_loss(capture, self.label)
                refuse_rest(capture, call, output, self.label, self.way_out)
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
            self.pl_module, batch, list(range(samples)), samples, run, memory, self.which, self.label, self.way_out
        )
        try:
            if self.measure is not None:
                seen.values = dict(self.measure(look))
                return seen
            call = look.loss()
        except SkippedBatchError:
            return None
        seen.values = rows_of_call(call)
        seen.floor = (1e-2 if self._is_coarse else 1e-4) * size_of_input(call)
        return seen

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
        if len(same) < len(first.values) and True not in values.values():
            self._warn_of_noise(True in verdicts)
        return True

    def _follow(self, first: Seen, other: Seen, name: str, order: Tensor, in_order: bool = True) -> bool | None:
        if name not in other.values:
            return False
        own, others = first.values[name], other.values[name]
        # The network does not compute the targets.
        exactness = (_EXACT, 0.0) if name == "target" else (5e-2 if self._is_coarse else 1e-3, first.floor)
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
        if wrong and self.measure is not None:
            raise RuntimeError(
                f"{self.label} takes score b for the b-th sample that was drawn, and when the same samples came in another "
                "order, the scores of score_fn did not follow. Return one score for each sample, in the order of the batch."
            )
        if wrong:
            self._refuse_step(wrong[0], "when the same samples came in another order", in_order)

    def _warn_of_noise(self, tensors_follow: bool) -> None:
        rest = "relies on the tensors of the batch, which do" if tensors_follow else "takes it for granted"
        rank_zero_warn(
            f"{self.label} cannot see whether the rows of the loss follow the samples, because training_step draws random "
            f"numbers in eval mode too; it {rest}. Draw them in training mode only, to have it checked."
        )


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
