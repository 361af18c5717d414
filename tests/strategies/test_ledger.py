"""What was sent, counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_grad.strategies import _ledger
from lightning_grad.strategies._ledger import ByteLedger, Stopwatch


def filled() -> ByteLedger:
    ledger = ByteLedger()
    for count in (10, 30):
        ledger.open(1000)
        ledger.send(torch.zeros(count, dtype=torch.uint8))
        ledger.send(torch.zeros(5, dtype=torch.bfloat16))
        ledger.close()
    return ledger


def test_bytes_of_a_step_and_of_the_run() -> None:
    ledger = filled()
    assert (ledger.steps, ledger.sent_bytes, ledger.dense_bytes) == (2, 60, 2000)
    assert (ledger.step_sent, ledger.step_dense) == (40, 1000)
    assert ledger.step_ratio == 1000 / 40
    assert ledger.ratio == 2000 / 60
    ledger.open(1000)
    ledger.send(torch.zeros(7, dtype=torch.uint8))
    assert (ledger.steps, ledger.sent_bytes, ledger.dense_bytes) == (2, 60, 2000), "what was not ended does not count"


def test_nothing_sent_is_no_division_by_zero() -> None:
    ledger = ByteLedger()
    assert ledger.ratio == ledger.step_ratio == 0.0
    ledger.open(8)
    ledger.close()
    assert ledger.ratio == 8.0


def test_a_view_counts_as_its_entries() -> None:
    ledger = ByteLedger()
    ledger.open(0)
    ledger.send(torch.zeros(100)[::10])
    assert ledger.step_sent == 40


def test_a_saved_ledger_goes_on() -> None:
    ledger = filled()
    row = {"step": 1.0, "ratio": 2.0}
    ledger.record.add(row)
    row["ratio"] = 3.0
    state = ledger.state_dict()
    other = ByteLedger()
    other.load_state_dict(state)
    assert other.state_dict() == state == ledger.state_dict()
    assert other.record.rows() == [{"step": 1.0, "ratio": 2.0}], "rows are copies"
    other.record.add({"step": 2.0})
    other.open(1)
    assert ledger.state_dict() == state, "the saved state is nobody's live one"
    assert len(state["record"]["rows"]) == 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a clock whose hand a test moves."""
    now = [100.0]
    monkeypatch.setattr(_ledger.time, "perf_counter", lambda: now[0])
    return now


def test_a_stopwatch_leaves_out_its_pauses(clock: list[float]) -> None:
    watch = Stopwatch(torch.device("cpu"))
    watch.start(True)
    clock[0] += 1.0
    with watch.paused():
        clock[0] += 10.0
    clock[0] += 2.0
    watch.stop()
    assert watch.seconds == 3.0
    clock[0] += 50.0
    watch.start(True)
    watch.stop()
    assert watch.seconds == 0.0


def test_a_pause_that_raises_ends_all_the_same(clock: list[float]) -> None:
    watch = Stopwatch(torch.device("cpu"))
    watch.start(True)

    def fail() -> None:
        clock[0] += 10.0
        raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"), watch.paused():
        fail()
    clock[0] += 1.0
    watch.stop()
    assert watch.seconds == 1.0


@pytest.mark.parametrize(("kind", "on", "waits"), [("cuda", True, 2), ("cuda", False, 0), ("cpu", True, 0)])
def test_a_gpu_is_waited_for_only_when_on(kind: str, on: bool, waits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(torch.cuda, "synchronize", calls.append)
    watch = Stopwatch(torch.device(kind))
    watch.start(on)
    watch.stop()
    assert len(calls) == waits
