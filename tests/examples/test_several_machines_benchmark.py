"""The benchmark of strategies over links runs, counts right, and leaves validation out of time and traffic."""

import logging
import signal
import time
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from benchmarks import several_machines
from benchmarks.network import Quality, why_unavailable
from benchmarks.rows import Results, table_of
from benchmarks.several_machines import LEARNERS, Epoch, Follow, Learned, learn
from lightning_grad.testing import on_ranks

DENSE = LEARNERS["dense"]


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


class SlowValidation(Follow):
    """A validation that takes an hour and sends a megabyte, by a clock and a counter of its own."""

    hours, megabytes = 0, 0

    def on_train_batch_end(self, *args, **kwargs):
        SlowValidation.megabytes += 1

    def on_validation_batch_start(self, *args, **kwargs):
        SlowValidation.hours += 1
        SlowValidation.megabytes += 1

    @staticmethod
    def perf_counter() -> float:
        return time.perf_counter() + 3600 * SlowValidation.hours

    @staticmethod
    def sent_bytes() -> int:
        return 1_000_000 * SlowValidation.megabytes


@pytest.fixture
def _small(monkeypatch) -> None:
    monkeypatch.setattr(several_machines, "WIDTH", 16)


@pytest.mark.usefixtures("_small")
def test_a_training_is_followed_without_its_validation_and_ends_at_the_goal(monkeypatch):
    monkeypatch.setattr(several_machines, "Follow", SlowValidation)
    monkeypatch.setattr(several_machines, "time", SlowValidation)
    monkeypatch.setattr(several_machines, "sent_bytes", SlowValidation.sent_bytes)
    whole, early = partial(learn, DENSE, epochs=2, devices=2), partial(learn, DENSE, epochs=2, devices=2)
    for learned, ended in on_ranks(2, lambda: (whole(stop_at=None), early(stop_at=0.0))):
        first, second = learned.epochs
        assert 0 < first.seconds < second.seconds < 3600
        assert (first.megabytes, second.megabytes) == (11, 22)
        assert second.accuracy > 0.15
        assert 0.15 < learned.accuracy < 1
        assert len(ended.epochs) == 1


def test_time_and_traffic_until_the_goal_are_shown_and_drawn():
    slow = [Epoch(0.5, 10.0, 100.0), Epoch(0.95, 20.0, 200.0)]
    found = {
        "dense": slow,
        "fp16": [Epoch(0.9, 30.0, 300.0)],
        "DiLoCo H=10": [Epoch(0.5, 2.5, 10.0), Epoch(0.97, 5.0, 20.0)],
    }
    printed = table_of(several_machines.rows_of(found))
    assert "| dense | 20.00 | 200.00 | 2 | 95.00 | 1.000 |" in printed
    assert "| fp16 | never | never | 1 | 90.00 |  |" in printed
    assert "| DiLoCo H=10 | 5.00 | 20.00 | 2 | 97.00 | 4.000 |" in printed
    figure = several_machines.draw({Quality(100.0): found, Quality(20.0, 20.0): found})
    lines = {line.get_label(): line.get_xdata() for line in figure.axes[0].lines}
    assert list(lines["DiLoCo H=10"]) == [10.0, 20.0]
    assert [axes.get_xlabel() for axes in figure.axes[1:]] == [
        "seconds over 100 Mbit/s",
        "seconds over 20 Mbit/s with 20 ms delay",
    ]


def test_seeds_are_compared_in_pairs_and_held_to_what_they_should_save():
    def runs(megabytes, *accuracies):
        return [Learned([Epoch(0.0, 1.0, megabytes)], accuracy) for accuracy in accuracies]

    rare, worse = several_machines.RARE
    found = {"dense": runs(100.0, 0.97, 0.98), rare: runs(4.0, 0.98, 0.97), worse: runs(10.0, 0.96, 0.97)}
    _, good, bad = several_machines.seed_rows(found)
    assert (good.ratio, good.is_over, bad.ratio, bad.is_over) == (25.0, False, 10.0, True)
    printed = table_of([*several_machines.seed_rows(found)])
    assert "| dense | 97.50 ± 0.71 | 100.00 |  |  | 1.000 |  |  |" in printed
    assert f"| {rare} | 97.50 ± 0.71 | 4.00 | +0.00 (-1.00 to +1.00) | yes | 25.000 | >= 20.00 | ok |" in printed
    assert f"| {worse} | 96.50 ± 0.71 | 10.00 | -1.00 (-1.00 to -1.00) | no | 10.000 | >= 20.00 | missed |" in printed


def test_without_namespaces_nothing_is_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(several_machines, "why_unavailable", lambda: "a slow link needs root")
    several_machines.main(["--out", str(tmp_path / "results.json")])
    assert "Skipped: a slow link needs root." in capsys.readouterr().out
    tables = Results.read(tmp_path / "results.json").tables
    assert len(tables) == 3
    assert not any(tables.values())


@pytest.mark.needs_root
@pytest.mark.usefixtures("_small")
def test_rare_exchanges_send_less_over_a_link(monkeypatch, tmp_path, capsys):
    if reason := why_unavailable():
        pytest.skip(reason)
    monkeypatch.setattr(several_machines, "LINKS", (Quality(1000.0),))
    monkeypatch.setattr(several_machines, "EPOCHS", 2)
    monkeypatch.setattr(several_machines, "SEEDS", 1)
    monkeypatch.setattr(several_machines, "RARE", several_machines.RARE[:1])
    several_machines.main(["--only", "dense", "DiLoCo H=10", "--out", str(tmp_path / "results.json")])
    capsys.readouterr()
    _, rare = Results.read(tmp_path / "results.json").tables[several_machines.ACCURACY]
    assert rare.ratio > 3
