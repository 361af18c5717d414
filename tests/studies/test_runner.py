"""The runner: rates are chosen on a seed of their own, no arm gets ahead, and what was stopped or killed goes on."""

import json
import math
import multiprocessing
import os
import signal
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from studies.claim import Run
from studies.plan import CHOICE_SEED, Plan
from studies.results import Line, Origin, Store, origin_of
from studies.runner import run_claims, verify_claims
from tests.studies.toy import Toy, study

HERE = origin_of(Toy())


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """Return what is in the file."""
    return [json.loads(text) for text in (folder / "toy.jsonl").read_text().splitlines()]


def line(arm: str, seed: int, rate: float | None = None, seconds: float = 1.0, **origin: Any) -> Line:
    """Return a result of the toy claim."""
    metrics = {"accuracy": 0.5 + 0.1 * (rate == 0.3), "curve": []}
    return Line(
        "toy", arm, seed, rate, Toy().settings, metrics, seconds, replace(HERE, **origin), "2026-01-01T00:00:00Z"
    )


# What is trained, and in which order.


def test_seed_by_seed_so_that_no_arm_is_ahead(tmp_path: Path) -> None:
    asked = study(tmp_path)
    assert asked.run() == 0
    assert asked.claim.trained == [("a", 0, None), ("b", 0, None), ("a", 1, None), ("b", 1, None)]


def test_rates_are_chosen_for_each_arm_on_a_seed_that_is_not_reported(tmp_path: Path) -> None:
    asked = study(tmp_path, rates=(0.3, 0.1))
    asked.run()
    choices, reported = asked.claim.trained[:4], asked.claim.trained[4:]
    assert choices == [(arm, CHOICE_SEED, rate) for rate in (0.3, 0.1) for arm in "ab"]
    assert reported == [("a", 0, 0.3), ("b", 0, 0.1), ("a", 1, 0.3), ("b", 1, 0.1)]  # a tie keeps the first rate
    assert {each.seed for each in asked.plan().reported} == {0, 1}


def test_a_diverged_training_does_not_choose_a_rate() -> None:
    claim = Toy(rates=(0.1, 0.3))
    diverged = replace(line("a", CHOICE_SEED, 0.1), metrics={"accuracy": math.nan, "curve": []})
    assert Plan(claim, [0], [diverged, line("a", CHOICE_SEED, 0.3)], HERE).rates == {"a": 0.3}


def test_an_arm_waits_for_its_rate_and_is_counted() -> None:
    plan = Plan(Toy(rates=(0.1, 0.3)), [0, 1], [line("a", CHOICE_SEED, rate) for rate in (0.1, 0.3)], HERE)
    expected = [Run("b", CHOICE_SEED, 0.1), Run("b", CHOICE_SEED, 0.3), Run("a", 0, 0.3), Run("a", 1, 0.3)]
    assert plan.ready == expected
    assert (plan.waiting, plan.missing, plan.total) == ([Run("b", 0), Run("b", 1)], 6, 8)


# How long it takes.


def test_the_estimate_is_that_of_the_same_arm_on_the_same_hardware() -> None:
    other = {"cpu": "slow", "threads": 1, "gpu": None}
    measured = [line("a", 0, seconds=2), line("a", 1, seconds=4), line("a", 2, seconds=9, hardware=other)]
    plan = Plan(Toy(), range(4), measured, HERE)
    assert [plan.seconds(Run(arm, 3)) for arm in "ab"] == [3, 3]
    assert plan.left == 5 * 3
    assert str(plan) == "toy: 5 trainings, 15 s by 3 measured trainings"
    assert Plan(Toy(), range(4), measured[2:], HERE).seconds(Run("a", 3)) == 9
    assert Plan(Toy(), range(5), [], HERE).left == 60  # as declared: one minute for five seeds
    assert Plan(Toy(), range(5), measured, HERE, pace=2.0).seconds(Run("a", 3)) == 6


def test_the_budget_ends_before_a_training_that_does_not_fit(tmp_path: Path) -> None:
    now = [0.0]
    asked = study(tmp_path, seeds=5)
    for arm, seconds in (("a", 10), ("b", 30)):
        asked.store.append(asked.claim, line(arm, 0, seconds=seconds))
    asked.clock = lambda: now[0]
    train, costs = Toy.train, {"a": 10, "b": 30}

    def slowly(claim: Toy, run: Run) -> Any:
        now[0] += costs[run.arm]
        return train(claim, run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Toy, "train", slowly)
        assert asked.run(deadline=65) == 5
    assert [(arm, seed) for arm, seed, _ in asked.claim.trained] == [("a", 1), ("b", 1), ("a", 2)]
    assert now[0] == 50  # 15 seconds are left: enough for a of seed 3, which would put it ahead of b


def test_a_budget_is_for_the_claims_first_that_need_the_least(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    given: list[Any] = []
    budgets = (("long", 3.0), ("short", 1.0), ("too long", 900.0))
    studies = [study(tmp_path, 5, name=name, budget=budget) for name, budget in budgets]
    monkeypatch.setattr("studies.runner.time.monotonic", lambda: 100.0)
    for each in studies:
        each.clock = time.monotonic
    monkeypatch.setattr("studies.runner.Study.run", lambda self, end: given.append((self.claim.name, end)))
    assert run_claims(studies, budget=8.0) == []
    assert given == [("short", 100 + 60 * 8), ("long", 100 + 60 * 8)]
    printed = capsys.readouterr().out
    assert "short: 10 trainings, 1 min as declared" in printed
    assert "together: 30 trainings, 15.1 h" in printed
    assert "long: the budget ends before 10 trainings. The same command continues." in printed
    assert "\ntoo long:\n" not in printed, "a name stands only above what it trains"
    given.clear()
    run_claims(studies, budget=None)
    assert [name for name, _ in given] == ["long", "short", "too long"], "without a budget, in the given order"


def test_a_short_budget_decides_a_claim_rather_than_a_part_of_each(tmp_path: Path) -> None:
    now = [0.0]
    asked = [study(tmp_path, 2, name=name, budget=2.0) for name in ("x", "y", "z")]
    train = Toy.train

    def slowly(claim: Toy, run: Run) -> Any:
        now[0] += 10
        return train(claim, run)

    for each in asked:
        each.store.append(each.claim, replace(line("a", 0, seconds=10), claim=each.claim.name))
        each.clock = lambda: now[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Toy, "train", slowly)
        patch.setattr("studies.runner.time.monotonic", lambda: now[0])
        run_claims(asked, budget=0.75)
    assert [each.plan().missing for each in asked] == [0, 2, 3]


def test_a_claim_that_fails_does_not_stop_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    studies = [study(tmp_path, arms=("a", "c"), name="bad"), study(tmp_path)]
    assert run_claims(studies, None) == ["bad"]
    assert [(each["arm"], each["seed"]) for each in lines_of(tmp_path)] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    printed = capsys.readouterr()
    assert "KeyError: 'c'" in printed.err
    assert "The training was: bad, c seed 0." in printed.err
    assert "b seed 1                           done   4 of 4, " in printed.out


# What was stopped goes on.


def test_nothing_is_trained_twice(tmp_path: Path) -> None:
    study(tmp_path, seeds=1).run()
    asked = study(tmp_path, seeds=2)
    asked.run()
    asked.run()
    assert [(arm, seed) for arm, seed, _ in asked.claim.trained] == [("a", 1), ("b", 1)]
    assert str(asked.plan()) == "toy: complete, 4 results"


def test_other_settings_and_devices_are_other_results(tmp_path: Path) -> None:
    study(tmp_path).run()
    for changed in ({"epochs": 4}, {"factor": 1.0}, {"device": "cuda"}):
        claim = Toy(**changed)
        assert Store(tmp_path).read(claim) == []
    assert len(Store(tmp_path).read(Toy(seeds=9, budget=2.0, output=Path("x")))) == 4


@pytest.mark.parametrize("cut", [1, 40, None])
def test_half_a_line_is_dropped_with_a_word_and_trained_again(
    cut: int | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study(tmp_path).run()
    path, before = tmp_path / "toy.jsonl", lines_of(tmp_path)
    written = path.read_bytes()
    start = written[:-1].rindex(b"\n") + 1
    path.write_bytes(written[: start + cut] if cut else written[:-1])  # the last one lacks only its line break
    asked = study(tmp_path)
    assert asked.plan().missing == 1
    capsys.readouterr()
    asked.run()
    assert "dropped an unfinished last line" in capsys.readouterr().err
    assert [(each["arm"], each["seed"], each["metrics"]) for each in lines_of(tmp_path)] == [
        (each["arm"], each["seed"], each["metrics"]) for each in before
    ]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    study(tmp_path).run()
    path = tmp_path / "toy.jsonl"
    texts = path.read_text().splitlines()
    path.write_text("\n".join([texts[0], texts[1][:50], *texts[2:], ""]))
    with pytest.raises(SystemExit, match=r"Cannot read line 2 of .*toy.jsonl.*Delete the line"):
        study(tmp_path).plan()


def go(folder: Path) -> None:
    """Run the toy claim in a process of its own."""
    study(folder, seeds=6, rates=(0.1, 0.3), duration=0.02).run()


def wait_for(condition: Any) -> None:
    """Wait at most ten seconds."""
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    assert condition()


@pytest.mark.filterwarnings("ignore:.*use of fork\\(\\) may lead to deadlocks:DeprecationWarning")
def test_a_killed_study_loses_and_doubles_nothing(tmp_path: Path) -> None:
    fork, path = multiprocessing.get_context("fork"), tmp_path / "toy.jsonl"
    for number in (1, 5, 9):  # kill it in the choice of rates, and twice later
        process = fork.Process(target=go, args=(tmp_path,))
        process.start()
        wait_for(lambda number=number: path.exists() and path.read_bytes().count(b"\n") >= number)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
    assert len(lines_of(tmp_path)) < 16
    both = [fork.Process(target=go, args=(tmp_path,)) for _ in range(2)]  # two processes share the rest
    for process in both:
        process.start()
    for process in both:
        process.join()
    done = Counter((each["arm"], each["seed"], each["rate"]) for each in lines_of(tmp_path))
    expected = {(arm, CHOICE_SEED, rate) for arm in "ab" for rate in (0.1, 0.3)}
    expected |= {(arm, seed, 0.1) for arm in "ab" for seed in range(6)}
    assert done == Counter(dict.fromkeys(expected, 1))


def test_what_another_process_trains_is_not_taken(tmp_path: Path) -> None:
    asked = study(tmp_path, seeds=1)
    with asked.store.reserve(asked.claim, Run("a", 0)) as free:
        assert free
        assert not asked.attempt(Run("a", 0, show=print), asked.plan()), "its name in another process"
        assert asked.attempt(Run("b", 0), asked.plan())
        with asked.store.reserve(replace(asked.claim, epochs=9), Run("a", 0)) as other:
            assert other
    assert asked.attempt(Run("a", 0), asked.plan())
    assert not asked.attempt(Run("a", 0), asked.plan()), "it is done"


# What a line holds.


def test_a_line_says_where_its_numbers_come_from(tmp_path: Path) -> None:
    asked = study(tmp_path, seeds=1)
    asked.run()
    (first, _) = lines_of(tmp_path)
    assert (first["claim"], first["arm"], first["seed"], first["rate"]) == ("toy", "a", 0, None)
    assert first["settings"] == {"epochs": 3, "factor": "nan"}
    assert first["metrics"] == {"accuracy": 0.5, "curve": ["nan", "inf", 0]}
    origin = first["origin"]
    assert set(origin["versions"]) == {"python", "torch", "lightning", "lightning-grad"}
    assert origin["hardware"]["cpu"]
    assert (origin["hardware"]["threads"], origin["hardware"]["gpu"]) == (1, None)
    assert (len(origin["commit"]), len(origin["code"])) == (12, 12) or origin["commit"] == "unknown"
    assert first["date"].startswith("20")
    (read, _) = asked.store.read(asked.claim)
    assert read.origin == HERE
    assert math.isnan(read.result(asked.claim).curve[0])
    assert read.result(asked.claim).curve[1:] == [math.inf, 0]


def test_fresh_trains_what_other_code_has_trained(tmp_path: Path) -> None:
    store, claim = Store(tmp_path), Toy()
    old: dict[str, Any] = {"code": "old", "commit": "0123"}
    for arm in "ab":
        store.append(claim, line(arm, 0, **old))
    store.append(claim, line("a", 0))
    asked = study(tmp_path, seeds=1)
    assert asked.plan().missing == 0
    assert [each.origin.code for each in asked.plan().reported] == [HERE.code, "old"]  # the last line of each
    asked.fresh = True
    asked.run()
    assert asked.claim.trained == [("b", 0, None)]
    assert len(lines_of(tmp_path)) == 4, "old lines stay"


def test_origin_is_written_in_words() -> None:
    hardware = {"cpu": "EPYC", "threads": 1, "gpu": None}
    origin = Origin("cpu", hardware, {"torch": "2.6"}, "abc", "0123", dirty=True)
    assert str(origin) == "commit 0123 with uncommitted changes (code abc), EPYC, 1 thread(s), torch 2.6"


# Results of other code.


def test_verify_trains_one_result_of_each_arm_again_until_it_stands(tmp_path: Path, capsys: Any) -> None:
    asked = study(tmp_path)
    for arm, seed in (("a", 0), ("b", 0), ("a", 1), ("b", 1)):
        gain = 0.1 * (arm == "b")
        metrics = {"accuracy": 0.5 + gain + 0.01 * seed, "curve": [math.nan, math.inf, seed]}
        asked.store.append(asked.claim, replace(line(arm, seed, code="older"), metrics=metrics))
    assert verify_claims([asked]) == []
    assert asked.claim.trained == [("a", 0, None), ("b", 0, None)]
    assert "b seed 0: the same numbers." in capsys.readouterr().out
    assert verify_claims([asked]) == []
    assert len(asked.claim.trained) == 2, "nothing is left to try"


def test_verify_tells_other_numbers(tmp_path: Path, capsys: Any) -> None:
    asked = study(tmp_path, seeds=1)
    for arm in "ab":
        asked.store.append(asked.claim, line(arm, 0, code="older"))
    assert verify_claims([asked]) == ["toy"]
    printed = capsys.readouterr().out
    assert "b seed 0: accuracy 0.5 became 0.6" in printed
    assert "--fresh trains all of them again" in printed


def test_verify_says_when_numbers_cannot_be_compared(tmp_path: Path, capsys: Any) -> None:
    asked = study(tmp_path, seeds=1)
    for arm in "ab":
        asked.store.append(asked.claim, line(arm, 0, code="older", versions={"torch": "1.0"}))
    verify_claims([asked])
    assert asked.claim.trained == [], "it would cost time and tell nothing"
    assert (
        "a seed 0: made on other hardware or with other versions, so it cannot be compared." in capsys.readouterr().out
    )
