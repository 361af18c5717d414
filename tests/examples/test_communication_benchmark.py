"""The benchmark of compressed gradients runs, counts right, and leaves validation out of the time. Nothing about speed."""

import logging
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch

from benchmarks import communication, network, slow_link
from benchmarks.communication import DGC, HALF, LEARNERS, Epoch, Follow
from benchmarks.rows import Results, table_of
from benchmarks.slow_link import Measured

TINY = communication.Sizes(rounds=1, steps=2, links={100.0: (1, 1), 1000.0: (1, 1)}, epochs=2)
NET = (40, 50, 30)


@pytest.fixture(autouse=True)
def _settings_of_the_process() -> Iterator[None]:
    """Undo what the script sets for the whole process."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels, threads = [logger.level for logger in loggers], torch.get_num_threads()
    handler = signal.getsignal(signal.SIGTERM)
    yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, handler)
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture
def small(monkeypatch) -> None:
    """Make everything tiny."""
    monkeypatch.setattr(communication, "QUICK", TINY)
    monkeypatch.setattr(communication, "NETS", {"a layer": ((100, 100), False), "a net": (NET, True)})
    monkeypatch.setattr(communication, "SMALLER", {("a layer", DGC): 499.0, ("a layer", HALF): 300.0})
    monkeypatch.setattr(communication, "WIDTHS", NET)
    monkeypatch.setattr(communication, "Perceptron", lambda widths=NET, bias=True: slow_link.Perceptron(widths, bias))
    monkeypatch.setattr(communication, "WIDTH", 16)


@pytest.mark.usefixtures("small")
def test_bytes_are_those_of_the_formulas_and_budgets_tell_right_from_wrong(tmp_path, capsys):
    communication.main(["--quick", "--parts", "payload", "--out", str(tmp_path / "results.json")])
    (found,) = Results.read(tmp_path / "results.json").tables.values()
    flag = 4
    rows = {tuple(row.name.split(", ", 1)): (*row.columns.values(),) for row in found}
    biases = 4 * 80 + flag
    assert rows == {
        ("a layer", DGC): (10 * 8 + flag, 40_000),
        ("a layer", HALF): (10 * 6 + flag, 40_000),
        ("a layer", "PowerSGD rank 1"): (4 * 200 + flag, 40_000),
        ("a layer", "PowerSGD rank 4"): (4 * 4 * 200 + flag, 40_000),
        ("a net", DGC): ((2 + 2) * 8 + biases, 4 * 3580),
        ("a net", HALF): ((2 + 2) * 6 + biases, 4 * 3580),
        ("a net", "PowerSGD rank 1"): (4 * (90 + 80) + biases, 4 * 3580),
        ("a net", "PowerSGD rank 4"): (4 * 4 * (90 + 80) + biases, 4 * 3580),
    }
    assert [row.ratio for row in found[:2]] == pytest.approx([40_000 / 84, 40_000 / 64])
    assert [row.is_over for row in found if row.budget is not None] == [True, False]
    printed = capsys.readouterr().out
    assert ">= 499.00 | missed |" in printed
    assert ">= 300.00 | ok |" in printed


@pytest.mark.usefixtures("small")
def test_steps_are_timed_beside_their_baselines(capsys):
    communication.main(["--quick", "--parts", "step"])
    printed = capsys.readouterr().out
    assert "| ddp, again |" in printed
    assert "| powersgd_torch | <= 1.05 |" in printed


@pytest.mark.usefixtures("small")
def test_steps_come_back_from_the_ranks_with_what_the_strategies_say_of_themselves():
    found = communication.on_ranks(partial(communication._time_in_turns, 1, 3), 2)
    assert {name: (len(times["ms"]), len(times["compress_ms"])) for name, times in found.items()} == {
        "ddp": (3, 0),
        "ddp, again": (3, 0),
        "fp16": (3, 0),
        "powersgd_torch": (3, 0),
        "powersgd": (3, 1),
        "dgc": (3, 1),
    }


def test_a_rank_that_fails_is_an_error_here():
    def fail():
        raise RuntimeError("no such gradient")

    with pytest.raises(Exception, match="no such gradient"):
        communication.on_ranks(fail, 1)


def test_steps_over_links_are_held_to_what_they_should_save(monkeypatch):
    asked = []

    def measure_all(compared, megabits, delay_ms, rounds, steps, settle):
        asked.append((megabits, rounds, steps))
        dense = 1000.0 / megabits
        return {name: Measured(dense / (4 if name == "dgc" else 1), 1.0, 1.0) for name in compared}

    monkeypatch.setattr(slow_link, "measure_all", measure_all)
    monkeypatch.setattr(network, "why_unavailable", lambda: None)
    tables = communication.link(TINY)
    assert asked == [(100.0, 1, 1), (1000.0, 1, 1)]
    assert {*tables} == {"A step over 100 Mbit/s", "A step over 1000 Mbit/s"}
    held = [row for rows in tables.values() for row in rows if row.budget is not None]
    assert [(row.name, row.ratio, row.budget, row.is_over) for row in held] == [
        ("dgc", 0.25, 0.1, True),
        ("dgc", 0.25, 0.5, False),
    ]
    assert all(len(rows) == len(communication.STRATEGIES) + 1 for rows in tables.values())


def test_without_namespaces_two_parts_are_skipped(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(network, "why_unavailable", lambda: "a slow link needs root")
    communication.main(["--parts", "link", "accuracy", "--out", str(tmp_path / "results.json")])
    assert capsys.readouterr().out.count("Skipped: a slow link needs root.") == 2
    tables = Results.read(tmp_path / "results.json").tables
    assert len(tables) == 4
    assert not any(tables.values())


class SlowValidation(Follow):
    """A validation that takes an hour for each batch, by a clock of its own."""

    late = 0.0

    def on_validation_batch_start(self, *args, **kwargs):
        SlowValidation.late += 3600

    @staticmethod
    def perf_counter() -> float:
        return time.perf_counter() + SlowValidation.late


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("name", "entry"), [("dense", 4), ("fp16", 2)])
def test_a_training_is_followed_without_its_validation(name, entry, monkeypatch):
    monkeypatch.setattr(communication, "Follow", SlowValidation)
    monkeypatch.setattr(communication, "time", SlowValidation)
    found = communication.on_ranks(lambda: [asdict(epoch) for epoch in communication.learn(name, 2, devices=2)], 2)
    first, second = (Epoch(**epoch) for epoch in found)
    assert (first.epoch, second.epoch) == (1, 2)
    assert 0 < first.seconds < second.seconds < 3600
    assert second.accuracy > 0.15
    steps, entries = 11, 64 * 16 + 16 + 16 * 16 + 16 + 16 * 10 + 10
    assert (first.megabytes, second.megabytes) == pytest.approx(
        (steps * entry * entries / 1e6, 2 * steps * entry * entries / 1e6)
    )
    assert communication.parameters() == entries


@pytest.mark.usefixtures("small")
def test_strategies_that_compress_count_for_themselves():
    found = communication.on_ranks(
        lambda: [asdict(epoch) for epoch in communication.learn("PowerSGD rank 4", 1, devices=2)], 2
    )
    # The first layer, of 1024 entries, is compressed: to four columns of 16 + 64; all others are small.
    assert found[0]["megabytes"] == pytest.approx(11 * 4 * (4 * 80 + 458 + 1) / 1e6)


def test_what_it_took_is_shown_and_drawn():
    slow = [Epoch(1, 0.5, 10.0, 100.0), Epoch(2, 0.95, 20.0, 200.0), Epoch(3, 0.94, 30.0, 300.0, 310.0)]
    found = {
        name: [replace(epoch, seconds=epoch.seconds / (i + 1)) for epoch in slow] for i, name in enumerate(LEARNERS)
    }
    found["fp16"] = [replace(epoch, accuracy=0.9) for epoch in slow]
    printed = table_of(communication.accuracy_rows(found))
    assert "| dense | 20.00 | 200.00 | 30.00 | 300.00 | 310.00 | 94.00 | 1.000 |" in printed
    assert "| fp16 | never | never | 30.00 | 300.00 | 310.00 | 90.00 |  |" in printed
    assert f"| {DGC} | 5.00 | 200.00 | 7.50 | 300.00 | 310.00 | 94.00 | 4.000 |" in printed
    lines = {line.get_label(): line.get_xdata() for line in communication.draw_accuracies(found).axes[1].lines}
    assert list(lines[DGC]) == [2.5, 5.0, 7.5]
