"""The tools for tests find what they are made to find."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist

from lightning_grad import testing
from lightning_grad.testing import (
    GuardStep,
    StopAfter,
    StopAt,
    StopIn,
    StopInTrainingStep,
    assert_identical,
    fit,
    guarded,
    on_ranks,
    optimizer_traces,
    trainer_traces,
)


def test_every_public_name_is_in_the_docstring() -> None:
    assert [name for name in testing.__all__ if name not in (testing.__doc__ or "")] == []


class Counts(pl.Callback):
    """Counts the batches that have begun, and those that have ended."""

    def __init__(self) -> None:
        self.begun = self.ended = 0

    def on_train_batch_start(self, *_: Any) -> None:
        self.begun += 1

    def on_train_batch_end(self, *_: Any) -> None:
        self.ended += 1


@pytest.mark.parametrize(
    ("stop", "begun", "ended"),
    [
        (StopAt(3), 4, 3),
        (StopAfter(3), 3, 3),
        (StopIn("on_before_optimizer_step", 3), 4, 3),
        (StopInTrainingStep(3), 4, 3),
    ],
    ids=["at the start", "at the end", "in a hook", "in the step"],
)
def test_a_fit_stops_where_it_is_told(stop: pl.Callback, begun: int, ended: int) -> None:
    counts = Counts()
    with pytest.raises(RuntimeError, match="stopped on purpose"):
        fit([counts, stop], max_epochs=1)
    assert (counts.begun, counts.ended) == (begun, ended)


@pytest.mark.filterwarnings("ignore:.*Detected KeyboardInterrupt")
def test_a_fit_stops_by_the_error_that_is_asked_for() -> None:
    with pytest.raises(SystemExit):  # what Lightning makes of it
        fit([StopAt(1, KeyboardInterrupt)], max_epochs=1)


def _work(number: int) -> tuple[int, int]:
    if number < 0 and dist.get_rank() == 1:
        raise ValueError("not on this rank")
    return dist.get_rank(), number


def test_work_on_ranks_returns_in_their_order_or_raises_with_the_rank() -> None:
    assert on_ranks(2, _work, 7) == [(0, 7), (1, 7)]
    with pytest.raises(AssertionError, match=r"(?s)^--- rank 1 ---.*ValueError: not on this rank"):
        on_ranks(2, _work, -1)


@pytest.mark.parametrize(
    ("one", "other", "found"),
    [
        ({"a": 1}, {"a": 1, "b": 2}, r"where: only one side has \['b'\]"),
        ([1, 2], [1], "where: 2 entries are not 1"),
        ([1, 2], [1, 3], "where/1: 2 is not 3"),
        (torch.zeros(1), torch.zeros(1, dtype=torch.int64), "where: torch.float32"),
        ({"w": torch.tensor([True])}, {"w": torch.tensor([False])}, "where/w differs by 1"),
        (1, 1.0, "where: int is not float"),
    ],
)
def test_states_that_differ_are_told_with_the_place(one: Any, other: Any, found: str) -> None:
    assert_identical(one, one)
    with pytest.raises(AssertionError, match=f"^{found}"):
        assert_identical(one, other, "where")


def test_hooks_that_an_optimizer_keeps_are_traces() -> None:
    trainer, module = fit([], max_epochs=1)
    optimizer = trainer.optimizers[0]
    before = optimizer_traces(optimizer), trainer_traces(trainer)
    handle = optimizer.register_step_post_hook(lambda *_: None)
    assert optimizer_traces(optimizer) != before[0]
    assert trainer_traces(trainer) != before[1]
    handle.remove()
    assert (optimizer_traces(optimizer), trainer_traces(trainer)) == before
    trainer.strategy.forgotten = lambda: module
    assert trainer_traces(trainer) != before[1]


def test_a_guard_lets_the_first_call_look_and_no_other() -> None:
    seen: list[str] = []
    look = guarded(lambda: torch.ones(1).item(), seen, "look")
    assert look() == 1.0
    with pytest.raises(AssertionError, match="waits for the device"):
        look()
    assert seen == ["look", "look"]


def test_a_guarded_step_raises_for_a_wrapper_that_reads_a_value() -> None:
    class Reads(pl.Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            step = pl_module.training_step

            def reading(batch: Any, batch_idx: int) -> Any:
                loss = step(batch, batch_idx)
                return loss * float(loss > 0)

            pl_module.training_step = reading

    with pytest.raises(AssertionError, match="waits for the device"):
        fit([Reads(), GuardStep([])], max_epochs=1, log_every_n_steps=1000)
