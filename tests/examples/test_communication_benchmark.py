"""The benchmark of compressed gradients runs and counts right. Nothing about speed."""

import dataclasses
import logging
import signal
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from plain_project import Digits, ImageClassifier
from torch import nn

from benchmarks import communication, network, slow_link
from benchmarks.communication import DGC, HALF, ONE_BIT
from benchmarks.rows import Results
from benchmarks.slow_link import Measured
from lightning_grad.strategies import PowerSGDStrategy

TINY = communication.Sizes(rounds=1, steps=2, links={100.0: (1, 1), 1000.0: (1, 1)})
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


def _perceptron(default, widths=None, *more, **rest):
    return slow_link.Perceptron(widths or default, *more, **rest)


@pytest.fixture
def small(monkeypatch) -> None:
    """Make everything tiny."""
    monkeypatch.setattr(communication, "QUICK", TINY)
    monkeypatch.setattr(communication, "NETS", {"a layer": ((100, 100), False), "a net": (NET, True)})
    monkeypatch.setattr(communication, "SMALLER", {("a layer", DGC): 499.0, ("a layer", HALF): 300.0})
    monkeypatch.setattr(communication, "WIDTHS", NET)
    monkeypatch.setattr(
        communication, "Perceptron", lambda widths=NET, *more, **rest: slow_link.Perceptron(widths, *more, **rest)
    )


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
        ("a layer", ONE_BIT): (10_000 // 8 + 4 + flag, 40_000),
        ("a net", DGC): ((2 + 2) * 8 + biases, 4 * 3580),
        ("a net", HALF): ((2 + 2) * 6 + biases, 4 * 3580),
        ("a net", "PowerSGD rank 1"): (4 * (90 + 80) + biases, 4 * 3580),
        ("a net", "PowerSGD rank 4"): (4 * 4 * (90 + 80) + biases, 4 * 3580),
        ("a net", ONE_BIT): (250 + 188 + 2 * 4 + biases, 4 * 3580),
    }
    assert [row.ratio for row in found[:2]] == pytest.approx([40_000 / 84, 40_000 / 64])
    assert [row.is_over for row in found if row.budget is not None] == [True, False]
    printed = capsys.readouterr().out
    assert ">= 499.00 | missed |" in printed
    assert ">= 300.00 | ok |" in printed


@pytest.mark.usefixtures("small")
def test_planned_levels_are_told_from_uniform_ones(monkeypatch):
    def module():
        return ImageClassifier(
            nn.Sequential(nn.Flatten(), nn.Linear(64, 40), nn.Linear(40, 10)), optimizer="sgd", lr=0.05
        )

    monkeypatch.setattr(communication, "LEVELS", [("PowerSGD", module, PowerSGDStrategy, "rank", 2, 1)])
    monkeypatch.setattr(communication, "Digits", lambda batch_size: Digits(350))  # two steps an epoch
    found, plans = communication.planned(dataclasses.replace(TINY, epochs=3)).values()
    uniform, lower, *planned = found
    matrix, rest = 4 * (64 + 40), 4 * (40 + 400 + 10 + 1)  # the second matrix is sent dense
    assert (uniform.columns["bytes"], lower.columns["bytes"]) == (2 * matrix + rest, matrix + rest)
    assert (uniform.ratio, lower.ratio) == (1.0, (2 * matrix + rest) / (matrix + rest))
    assert (uniform.columns["unsent"], uniform.columns["error"]) == (1.0, "")
    of_plan = (8 * 10 + 4) // 2  # the only matrix keeps its rank; 10 ranks are possible
    for row in planned:
        assert row.columns["bytes"] == 2 * matrix + rest + of_plan
        assert row.columns["error"] == 1.0
        assert row.is_over, "it sends no less"
    assert all(row.milliseconds > 0 for row in plans)


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
        "ddp_adam": (3, 0),
        "onebit_adam": (3, 1),
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


def test_without_namespaces_links_are_skipped(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(network, "why_unavailable", lambda: "a slow link needs root")
    communication.main(["--parts", "link", "--out", str(tmp_path / "results.json")])
    assert capsys.readouterr().out.count("Skipped: a slow link needs root.") == 1
    tables = Results.read(tmp_path / "results.json").tables
    assert len(tables) == 2
    assert not any(tables.values())
