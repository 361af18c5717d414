"""The trials of all techniques, in rounds."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from lightning_grad.cli.catalog import is_strategy
from lightning_grad.cli.check.memory import can_fork, peak_of
from lightning_grad.cli.check.outcome import Outcome
from lightning_grad.cli.check.ranks import try_strategy
from lightning_grad.cli.check.rows import ROUNDS, Row
from lightning_grad.cli.check.sources import ShortProject
from lightning_grad.cli.check.trial import try_out

_BARE = 3  # runs without a technique, whose memory shows what differs by chance
_GROUP = 5  # techniques that share a run without one


class Rounds:
    """Tries techniques on a project.

    Args:
        project: Builds the module and its data.
        techniques: Classes to try, in the order of the rows.
        batches: Batches for each epoch, as a run without a technique had them.
        memory: Whether to measure memory.
        count: Number of rounds. Techniques whose step time is still unclear get up to as many again.

    Attributes:
        rows: What is known, also if :meth:`run` is interrupted.
    """

    def __init__(
        self, project: ShortProject, techniques: Sequence[type[Any]], batches: int, memory: bool, count: int = ROUNDS
    ) -> None:
        self.rows = {technique: Row(technique) for technique in techniques}
        self._project = project
        self._batches = batches
        self._memory = memory
        self._count = count

    def run(self) -> None:
        """Try all techniques, and show the progress. Strategies come first, before a GPU is used."""
        strategies = [technique for technique in self.rows if is_strategy(technique)]
        callbacks = [technique for technique in self.rows if not is_strategy(technique)]
        with tqdm(total=len(strategies) + self._count * len(callbacks), unit="trial", disable=None, leave=False) as bar:
            for strategy in strategies:
                bar.set_description(strategy.__name__)
                self.rows[strategy] = try_strategy(self._project, strategy, self._batches)
                bar.update()
            for round_ in range(self._count):
                self._round(bar, [technique for technique in callbacks if self.rows[technique].is_open])
                if round_ == 0:
                    self._other_round(bar, [technique for technique in callbacks if self.rows[technique].has_passes])
            for _ in range(self._count):  # another process disturbed these
                unclear = [technique for technique in callbacks if self.rows[technique].is_unclear]
                bar.total += len(unclear)
                self._round(bar, unclear)
            if self._memory:
                self._measure_memory(bar, [technique for technique in callbacks if self.rows[technique].is_open])

    def _round(self, bar: Any, techniques: Sequence[type[Any]]) -> None:
        for group in _groups(techniques):
            bare = self._try(bar, None)
            for technique in group:
                row = self.rows[technique]
                is_first = row.outcome.status == "not tried"
                row.add(self._try(bar, technique), bare)
                bar.update()
                if is_first and not row.is_open:
                    bar.total -= self._count - 1

    def _other_round(self, bar: Any, techniques: Sequence[type[Any]]) -> None:
        """Double the length of the epochs, to tell passes through the data from a fixed number of steps."""
        bare = self._try(bar, None, 2 * self._batches) if techniques else None
        for technique in techniques:
            outcome = self._try(bar, technique, 2 * self._batches)
            if bare is not None and outcome.status == bare.status == "runs":
                self.rows[technique].compare_calls(outcome, bare)

    def _try(self, bar: Any, technique: type[Any] | None, batches: int | None = None) -> Outcome:
        bar.set_description(technique.__name__ if technique else "without a technique")
        return try_out(self._project, technique, batches or self._batches)

    def _measure_memory(self, bar: Any, techniques: Sequence[type[Any]]) -> None:
        if torch.cuda.is_initialized() or not can_fork():  # type: ignore[no-untyped-call]
            return  # CUDA has told its peaks
        bar.total += len(techniques) + _BARE
        bare: list[int] = []
        for technique in (*[None] * _BARE, *techniques):
            bar.set_description(f"memory of {technique.__name__ if technique else 'a run without a technique'}")
            peak = peak_of(partial(self._succeeds, technique))
            bar.update()
            if peak is None:
                continue
            if technique is None:
                bare.append(peak)
            elif bare:
                self.rows[technique].memory = (peak - max(bare), max(bare) - min(bare))

    def _succeeds(self, technique: type[Any] | None) -> bool:
        return try_out(self._project, technique, self._batches, accelerator="cpu").status == "runs"


def _groups(techniques: Sequence[type[Any]]) -> Iterator[Sequence[type[Any]]]:
    for start in range(0, len(techniques), _GROUP):
        yield techniques[start : start + _GROUP]
