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
import torch.utils._pytree as pytree
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_grad.callbacks._quiet import eager, generators_kept, quiet
from lightning_grad.callbacks._scoring import (
    SCORE_FN,
    Look,
    Measure,
    SkippedBatchError,
    runner,
    scoring_loader,
    seed_streams,
    to_device,
)
from lightning_grad.callbacks._whole_step import refuse_rest
from lightning_grad.functional import LossCall
from lightning_grad.functional._whole_loss import WholeLossCapture
from lightning_grad.utilities.batches import copy_of, reordered
from lightning_grad.utilities.training_set import TrainingSet

_EXACT = 1e-5
_DRAWS = 4  # of samples, until a batch of them has a loss
_PUT_BACK = (
    "Put the rows back in the order of the samples before the loss, with all rows of a sample together: "
    "torch.stack([x, x], 1).flatten(0, 1) in place of torch.cat([x, x])"
)
_KEEP = (
    "Let collate_fn keep the order of the samples. Where a layer needs them sorted, let training_step sort, and put the rows "
    "back before the loss; pack_padded_sequence(enforce_sorted=False) does both"
)


@dataclass
class Seen:
    """What one run of a batch shows of its samples.

    Args:
        tensors: The tensors of the batch that have a row for each sample.
        values: What the step made of each sample, (B, ...), by name.
    """

    tensors: list[Tensor] = field(default_factory=list)
    values: dict[str, Tensor] = field(default_factory=dict)


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

    def check_loader(self, training_set: TrainingSet, dataset: Any = None, in_training: bool = False) -> None:
        """Check the rows of batches that ``collate_fn`` makes of the training set's samples.

        Args:
            training_set: The training set.
            dataset: Read the samples here instead, at the same indices.
            in_training: Whether losses are read in training, so that those in training mode are looked at too.

        Raises:
            RuntimeError: If rows do not follow the samples, or the loss is seen only in part.
        """
        runs = self.measure is not None or (self.runs_the_step and training_set.is_whole_batch)
        population, world = training_set.sampler.population, self.trainer.world_size
        size = min(training_set.sampler.batch_size, len(population) // world)
        mine, memory = population[self.trainer.global_rank :: world], dict[str, Any]()
        for draw in range(_DRAWS):
            chosen = torch.randperm(len(mine), generator=torch.Generator().manual_seed(draw))[:size]
            indices = mine[chosen].tolist()

            def see(order: Tensor, seed: int, indices: list[int] = indices) -> Seen | None:
                with self._loaded(training_set, dataset, indices, order, seed) as batch:
                    if batch is None:
                        return None
                    seen = Seen([leaf.clone() for leaf in rows_of_batch(batch, size)])
                    return self._run(to_device(self.trainer, batch), size, memory, seen) if runs else seen

            if self._compare(see, size, has_tensors=True):
                if in_training and runs:
                    with self._loaded(training_set, dataset, indices, torch.arange(size), 0) as batch:
                        self.check_whole_loss(to_device(self.trainer, batch), size)
                return

    def check_batch(self, batch: Any, samples: int) -> None:
        """Check that the losses of a batch follow its rows, where no index is credited with anything.

        Raises:
            RuntimeError: If they do not.
        """
        memory: dict[str, Any] = {}

        def see(order: Tensor, seed: int) -> Seen | None:
            with self._quiet(seed):
                return self._run(reordered(copy_of(batch), order), samples, memory, Seen())

        self._compare(see, samples, has_tensors=False)

    def check_whole_loss(self, batch: Any, samples: int | None) -> None:
        """Run the step on a batch in training mode, and raise if its loss is seen only in part.

        Raises:
            RuntimeError: If it is, or if the step changes a parameter.
        """
        if self.which is not None:
            return
        advice = f", or {self.way_out}"
        with quiet(self.trainer, self.pl_module, evaluate=False, advice=advice), eager(), torch.enable_grad():
            capture = WholeLossCapture(self.pl_module, samples, way_out=self.way_out)
            with capture:
                output = runner(self.trainer, self.pl_module, batch, 0)()
            if output is not None:
                refuse_rest(capture, capture.only(), output, self.label, self.way_out)

    @contextmanager
    def _quiet(self, seed: int) -> Iterator[None]:
        with quiet(self.trainer, self.pl_module, advice=f", or {self.way_out}"), torch.no_grad():
            seed_streams(seed)
            yield

    @contextmanager
    def _loaded(
        self, training_set: TrainingSet, dataset: Any, indices: list[int], order: Tensor, seed: int
    ) -> Iterator[Any]:
        """Give the batch of some samples, as ``collate_fn`` makes it of them in an order, in a quiet module."""
        loader = training_set.loader

        def collate(items: Any) -> Any:
            seed_streams(seed)  # the items are read with the same random numbers each time, in the same order
            return loader.collate_fn([items[place] for place in order.tolist()])

        once = scoring_loader(loader, dataset, [indices], 0, in_main_process=True, collate=collate)
        with generators_kept(once.dataset), self._quiet(0):
            batch = next(iter(once))
            seed_streams(seed)
            yield batch

    def _run(self, batch: Any, samples: int, memory: dict[str, Any], seen: Seen) -> Seen | None:
        run = runner(self.trainer, self.pl_module, batch, 0)
        look = Look(
            self.pl_module, batch, list(range(samples)), samples, run, memory, self.which, self.label, self.way_out
        )
        try:
            seen.values = dict(self.measure(look)) if self.measure is not None else _rows_of_call(look.loss())
        except SkippedBatchError:
            return None
        return seen

    def _compare(self, see: See, samples: int, has_tensors: bool) -> bool:
        """Return whether there was anything to compare."""
        if samples < 2:
            return True
        first, again = see(torch.arange(samples), 0), see(torch.arange(samples), 1)
        if first is None or again is None:
            return False
        noise = [
            name
            for name, value in first.values.items()
            if not is_close(again.values[name], value, self._tolerance(name))
        ]
        for order in orders_of(samples):
            other = see(order, 0)
            if other is None:
                return False
            tensors = [
                follows(one, two, order, _EXACT)
                for one, same, two in zip(first.tensors, again.tensors, other.tensors, strict=True)
                if is_close(same, one, _EXACT)
            ]
            values = {
                name: follows(value, other.values[name], order, self._tolerance(name))
                for name, value in first.values.items()
                if name not in noise
            }
            self._judge(tensors, values)
        if noise and True not in values.values():
            self._warn_of_noise(has_tensors and bool(tensors))
        return True

    def _judge(self, tensors: Sequence[bool | None], values: Mapping[str, bool | None]) -> None:
        wrong = [name for name, follow in values.items() if follow is False]
        # A collate_fn that reorders moves them all; one alone may be no row a sample, and as long as the batch by chance.
        moved = False in tensors and True not in tensors
        if moved and (wrong or True not in values.values()):
            raise RuntimeError(
                f"{self.label} takes row b of a batch for the b-th sample that was drawn, and collate_fn does not keep that "
                f"order: with the same samples in another order, the rows of its batch did not follow. {_KEEP}."
            )
        if wrong and self.measure is not None:
            raise RuntimeError(
                f"{self.label} takes row b of a batch for the b-th sample that was drawn, and the {wrong[0]}s did not follow "
                "when the same samples came in another order. Return one score for each sample, in the order of the batch."
            )
        if wrong:
            raise RuntimeError(
                f"{self.label} takes the rows of a loss for the samples of the batch, in their order, and training_step does "
                f"not keep it: when the same samples came in another order, the {wrong[0]} of the loss did not follow. It may "
                f"sort, join views by torch.cat, or leave out or repeat rows. {_PUT_BACK}; or {self.way_out}."
            )

    def _warn_of_noise(self, has_tensors: bool) -> None:
        rest = "relies on the tensors of the batch, which do" if has_tensors else "takes it for granted"
        rank_zero_warn(
            f"{self.label} cannot see whether the rows of the loss follow the samples, because training_step draws random "
            f"numbers in eval mode too; it {rest}. Draw them in training mode only, to have it checked."
        )

    def _tolerance(self, name: str) -> float:
        if name == "target":  # which the network does not compute
            return _EXACT
        return 5e-2 if "16" in str(self.trainer.precision) else 1e-3


def orders_of(samples: int) -> Iterator[Tensor]:
    """Yield orders of a batch that together show every other order than that of the samples: the first moves each sample.

    An order that does not depend on the data, such as the reverse, shows only if it does not commute with these. No order but
    the samples' own commutes with both, from three samples on.

    Example:
        >>> [order.tolist() for order in orders_of(4)]
        [[1, 2, 3, 0], [2, 1, 3, 0]]
    """
    rolled = torch.arange(samples).roll(-1)
    yield rolled
    if samples > 2:
        yield torch.cat([rolled[:2].flip(0), rolled[2:]])


def follows(before: Tensor, after: Tensor, order: Tensor, tolerance: float = 0.0) -> bool | None:
    """Return whether rows stand in another order, ``None`` if they are too alike to tell.

    Example:
        >>> rows, order = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1, 2, 0])
        >>> follows(rows, rows[order], order), follows(rows, rows, order)
        (True, False)
        >>> follows(torch.ones(3), torch.ones(3), order) is None
        True
    """
    if before.shape != after.shape:
        return False
    expected = before[order.to(before.device)]
    if not is_close(after, expected, tolerance):
        return False
    return None if is_close(expected, before, tolerance) else True


def is_close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    """Return whether two tensors are equal, up to what another order of summation may change.

    Example:
        >>> x = torch.tensor([1.0, torch.nan, 100.0])
        >>> is_close(x, x * 1.00001, 1e-3), is_close(x, x.flip(0), 1e-3)
        (True, False)
    """
    if one.shape != other.shape:
        return False
    if not (one.is_floating_point() or one.is_complex()):
        return torch.equal(one, other)
    if one.numel() == 0:
        return True
    size = other.detach().abs().float()
    scale = size[size.isfinite()].median() if bool(size.isfinite().any()) else size.new_zeros(())
    return bool(torch.isclose(one, other, rtol=tolerance, atol=tolerance * float(scale), equal_nan=True).all())


def rows_of_batch(batch: Any, samples: int) -> list[Tensor]:
    """Return the tensors of a batch that have a row for each sample."""
    found: list[Tensor] = []

    def note(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.layout == torch.strided and leaf.dim() and len(leaf) == samples:
            found.append(leaf)
        return leaf

    pytree.tree_map(note, batch)
    return found


def _rows_of_call(call: LossCall) -> dict[str, Tensor]:
    """Return a few numbers for each sample that tell what the loss got of it."""
    found = {}
    for name, value in (("input", call.input), ("target", call.target)):
        if value.dim() and len(value) and len(value) % call.samples == 0:
            found[name] = _summary(value).reshape(call.samples, -1)
    return found if len(found) == 2 else {"value": call.losses.detach()}


def _summary(rows: Tensor) -> Tensor:
    """Return one number for each row, which tells rows apart: logits of a vocabulary are too large to be copied often."""
    flat = rows.flatten(1) if rows.dim() > 1 else rows.unsqueeze(1)
    flat = flat.float().nan_to_num(0.0).clamp(-1e4, 1e4)  # masked logits would hide the others
    return flat @ torch.arange(1.0, flat.shape[1] + 1, device=flat.device).cos()
