"""Which ratio, which passes and which memory are shown, and how memory is measured."""

import functools
from typing import Any

import pytest
import torch

from lightning_grad import callbacks
from lightning_grad.cli.check import rounds
from lightning_grad.cli.check.memory import peak_of
from lightning_grad.cli.check.outcome import Outcome
from lightning_grad.cli.check.rounds import Rounds
from lightning_grad.cli.check.rows import Extra, Row
from tests.cases import cases

MB = 2**20


def timed(ours: str, bare: str) -> Row:
    return Row(object, rounds=[(float(a), float(b)) for a, b in zip(ours.split(), bare.split(), strict=True)])


@cases(
    ("ours", "bare", "shown"),
    [
        ("2 2 2 2", "1 1 1 1", "-"),  # four rounds are too few
        ("2 2 2 2 2", "1 1 1 1 1", "2.0"),
        ("2 4 6 8 20", "1 2 3 4 10", "2.0"),  # the machine slows down
        ("2 2 3.1 2 2", "1 1 1 1 1", "about 1"),
        ("2 2 3.1 2 2 2 2 2", "1 1 1 1 1 1 1 1", "2.0"),  # of eight rounds, one may be disturbed
        ("2 2 3.1 3.1 2 2 2 2", "1 1 1 1 1 1 1 1", "about 1"),
        ("1.09 1.09 1.09 1.09 1.09", "1 1 1 1 1", "about 1"),
        ("0.5 0.5 0.5 0.5 0.5", "1 1 1 1 1", "0.5"),
    ],
)
def test_a_ratio_is_shown_only_if_rounds_agree(ours: str, bare: str, shown: str) -> None:
    assert timed(ours, bare).step_time == shown


def test_an_unclear_step_time_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {callbacks.ZClip: iter([2.0, 5.0, 2.0, 2.1, 2.2, 2.1, 2.0, 2.1]), callbacks.NormClipping: iter([1.0] * 5)}

    def try_out(project: Any, technique: Any, *_: Any, **__: Any) -> Outcome:
        return Outcome(seconds=[next(times[technique]) if technique else 1.0])

    monkeypatch.setattr(rounds, "try_out", try_out)
    made = Rounds(None, [*times], 2, memory=False)  # type: ignore[arg-type]
    made.run()
    assert made.rows[callbacks.ZClip].step_time == "2.1"
    assert len(made.rows[callbacks.ZClip].rounds) == 8  # then one that was disturbed does not count
    assert len(made.rows[callbacks.NormClipping].rounds) == 5


@cases(
    ("phase", "extra", "shown"),
    [
        ("elsewhere", [(0, 4), (0, 8)], "-"),
        ("elsewhere", [(-2, 4), (-4, 8)], "-"),
        ("elsewhere", [(8, 4), (16, 8)], "2 x training data"),
        ("elsewhere", [(10, 4), (18, 8)], "2 x training data"),  # two steps in the whole run are a rehearsal
        ("elsewhere", [(17, 4), (25, 8)], "2 x training data, 3 steps an epoch"),
        ("elsewhere", [(39, 4), (39, 4)], "13 steps an epoch"),  # no longer epoch exists
        ("validation", [(36, 12), (72, 24)], "3 x validation"),
        ("elsewhere", [(2, 2)], "1 x training data"),  # fewer steps than epochs
        ("validation", [(38, 12), (38, 12)], "3 x validation"),  # no longer validation exists
        ("validation", [(40, 12), (76, 24)], "3 x validation"),  # two loaders, each with a rehearsal
        ("validation", [(3, 0)], "1 validation steps an epoch"),
    ],
)
def test_passes_through_the_data_are_told_from_a_fixed_number(phase: str, extra: list[Any], shown: str) -> None:
    assert Row(object, extra={phase: [Extra(*each) for each in extra]}).passes == shown


@cases(
    ("memory", "shown"),
    [
        (None, "-"),
        ((10 * MB, MB), "+10 MB"),
        ((10 * MB, 11 * MB), "about 0"),
        ((MB, 0), "about 0"),
        ((-5 * MB, 0), "-5 MB"),
    ],
)
def test_memory_is_shown_if_it_is_more_than_chance(memory: tuple[int, int] | None, shown: str) -> None:
    assert Row(object, memory=memory).memory_in_words == shown


def test_the_peak_of_the_device_is_compared() -> None:
    row = Row(object)
    row.add(Outcome(peak=50 * MB), Outcome(peak=20 * MB))
    assert row.memory_in_words == "+30 MB"


def take(megabytes: int, succeeds: bool = True) -> bool:
    torch.ones(megabytes, 2**18)
    return succeeds


def test_the_peak_of_a_forked_process_is_its_own() -> None:
    small, large = (peak_of(functools.partial(take, megabytes)) for megabytes in (1, 100))
    assert small is not None
    assert large is not None
    assert 90 * MB < large - small < 120 * MB
    again = peak_of(functools.partial(take, 1))  # the peak of a process never falls
    assert again is not None
    assert again - small < 50 * MB
    assert peak_of(functools.partial(take, 1, False)) is None
    assert peak_of(functools.partial(exit, 1)) is None


def test_memory_is_compared_with_runs_without_the_technique(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = iter([100 * MB, 103 * MB, 101 * MB, 113 * MB, None])
    monkeypatch.setattr(rounds, "peak_of", lambda _: next(peaks))
    monkeypatch.setattr(rounds, "try_out", lambda *_, **__: Outcome())
    tried = [callbacks.ZClip, callbacks.NMSparsity]
    made = Rounds(None, tried, 2, memory=True, count=1)  # type: ignore[arg-type]
    made.run()
    assert [made.rows[technique].memory for technique in tried] == [(10 * MB, 3 * MB), None]
