"""Verdicts follow from paired differences, and the report says what they rest on."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from studies.claims import CLAIMS
from studies.plan import CHOICE_SEED
from studies.report import print_report, show_family
from studies.verdict import CONTRADICTED, HOLDS, NOT_SHOWN, PART, Comparison, compare, judge
from tests.studies.test_runner import line
from tests.studies.toy import Result, Toy, study


@pytest.mark.parametrize(
    ("differences", "margin", "word"),
    [
        ([0.1, 0.2, 0.1, 0.2, 0.1], 0.0, HOLDS),
        ([0.1, 0.2, 0.1, 0.2, 0.1], 0.14, NOT_SHOWN),
        ([0.1, 0.2, 0.1, 0.2, 0.1], 0.3, CONTRADICTED),
        ([-0.1, 0.2, -0.1, 0.2, 0.1], 0.0, NOT_SHOWN),
        ([0.0] * 5, 0.0, NOT_SHOWN),
        ([0.0] * 5, -0.01, HOLDS),  # no worse than by a point
        ([-0.02, -0.03, -0.02, -0.03, -0.02], -0.01, CONTRADICTED),
        ([0.1, 0.2, 0.1, 0.2], 0.0, "undecided (4 of 5 seeds)"),
        ([], 0.0, "undecided (0 of 5 seeds)"),
        ([math.inf, 0.1, 0.1, 0.2, 0.1], 0.0, HOLDS),  # the other one diverged once
        ([math.inf, -math.inf, 0.1, 0.2, 0.1], 0.0, NOT_SHOWN),
        ([-math.inf, 0.1, 0.1, 0.2, 0.1], 0.0, NOT_SHOWN),
        ([-math.inf] * 5, 0.0, CONTRADICTED),
    ],
)
def test_word_of_a_comparison(differences: list[float], margin: float, word: str) -> None:
    assert Comparison("b", "a", differences, margin).word == word


def test_interval_is_students() -> None:
    scipy = pytest.importorskip("scipy.stats")
    values = [0.3, 0.1, 0.4, 0.1, 0.5, 0.9]
    expected = scipy.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert Comparison("b", "a", values).interval == pytest.approx((expected.low, expected.high))


def test_differences_are_paired_by_seed() -> None:
    """Seeds differ by far more than the arms do, so unpaired means would show nothing."""
    results = [Result(arm, seed, None, 10.0 * seed + (arm == "b"), []) for seed in range(5) for arm in "ab"]
    results.append(Result("b", 7, None, 999.0, []))
    (comparison,) = compare(Toy(), results)
    assert (comparison.differences, comparison.interval, comparison.word) == ([1.0] * 5, (1.0, 1.0), HOLDS)
    (lower,) = compare(Toy(higher=False), results)
    assert (lower.differences, lower.word) == ([-1.0] * 5, CONTRADICTED)


def test_two_diverged_trainings_say_nothing() -> None:
    """No difference would confirm that an arm is no worse than the other."""
    results = [Result(arm, seed, None, math.nan, []) for seed in range(5) for arm in "ab"]
    (comparison,) = compare(Toy(margin=-0.01), results)
    assert (comparison.differences, comparison.word) == ([], "undecided (0 of 5 seeds)")


def test_a_claim_of_several_comparisons() -> None:
    holds, fails = Comparison("b", "a", [1.0] * 5), Comparison("c", "a", [-1.0] * 5)
    unclear = Comparison("e", "a", [0.0] * 5)
    open_ones = [Comparison("d", "a", [1.0] * seeds) for seeds in (3, 2)]
    assert judge([holds, holds]) == HOLDS
    assert judge([holds, fails]) == PART
    assert judge([unclear, unclear]) == NOT_SHOWN
    assert judge([fails, unclear]) == CONTRADICTED
    assert judge([holds, unclear]) == PART
    assert judge([fails]) == CONTRADICTED
    assert judge([]) == "undecided (nothing is compared)"
    assert judge([holds, *open_ones]) == "undecided (2 of 5 seeds)"


def test_report_has_the_numbers_and_the_rule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = study(tmp_path, seeds=5, rates=(0.1, 0.3, 0.5), scale=100, unit="%", margin=0.01)
    asked.run()
    capsys.readouterr()
    print_report(asked.plan())
    printed = capsys.readouterr().out
    assert "toy: holds\n    Arm b is better.\n" in printed
    assert "b     0.1    62.00 ± 0.71   5" in printed
    assert ["b", "a", "+10.00", "+10.00", "to", "+10.00", "5", "holds"] in [
        line.split() for line in printed.splitlines()
    ]
    assert "a difference counts if it is above +1.00" in printed
    assert "comparisons: 1" in printed
    assert "best rate at the end of the grid, so a better one may be outside: a, b" in printed
    assert printed.count("results of commit") == 1
    assert "Note:" not in printed


def test_results_of_other_code_are_never_mixed_silently(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = study(tmp_path, seeds=2)
    for seed in range(2):
        asked.store.append(asked.claim, line("a", seed))
        asked.store.append(asked.claim, line("b", seed, code="old", commit="0123456789ab"))
    print_report(asked.plan())
    printed = capsys.readouterr().out
    assert "undecided (2 of 5 seeds)" in printed
    assert "2 results of commit 0123456789ab" in printed
    assert "Note: these results are of different code, versions or hardware.\n--verify tries one" in printed
    for seed in range(2):
        asked.store.append(asked.claim, line("a", seed, code="old"))
    print_report(asked.plan())
    assert "Note: the code has changed since" in capsys.readouterr().out


def test_diverged_trainings_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = study(tmp_path, seeds=2)
    for arm in "ab":
        for seed in range(2):
            value = math.nan if (arm, seed) == ("a", 1) else 0.5
            asked.store.append(asked.claim, replace(line(arm, seed), metrics={"accuracy": value, "curve": []}))
    print_report(asked.plan())
    printed = capsys.readouterr().out
    assert "1 of 2 diverged" in printed
    assert "smallest to largest difference" in printed


def test_figures_need_a_seed_with_all_arms_and_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = study(tmp_path, seeds=1)
    asked.store.append(asked.claim, line("a", 0))
    show_family(asked.plan())
    assert "no seed has all arms yet" in capsys.readouterr().out


def test_the_seed_of_the_choice_is_above_the_reported_ones() -> None:
    for claim in CLAIMS.values():
        assert claim.seeds <= CHOICE_SEED
        pairs = claim.comparisons()
        assert pairs
        assert {arm for pair in pairs for arm in pair} <= set(claim.arms)
        claim.check()
