"""The study of loss spikes: they are counted as defined, and everything promised is written."""

import csv
from pathlib import Path

import pytest

from studies.claims.clipping_spikes import RULES, Result, Spikes, find_spikes
from studies.common import read_table
from studies.figures.clipping_spikes import print_table
from studies.report import write
from studies.runner import train_all

PNG = b"\x89PNG\r\n\x1a\n"

# What Lightning and torch say about themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
]


# Spikes.

FLAT = [1.0, 1.05, 0.95, 1.0] * 25


def test_a_flat_loss_has_no_spikes() -> None:
    assert find_spikes(FLAT) == []


def test_a_falling_loss_has_no_spikes() -> None:
    assert find_spikes([2.0 - 0.01 * step for step in range(150)]) == []


def test_a_spike_lasts_until_the_loss_is_back() -> None:
    assert find_spikes([*FLAT[:60], 3.0, 2.0, 1.5, *FLAT[:20]]) == [(60, 5)]  # 1.0 and 1.05 are not below the median


def test_two_spikes_are_two() -> None:
    assert [step for step, _ in find_spikes([*FLAT[:60], 3.0, *FLAT[:20], 4.0, *FLAT[:20]])] == [60, 81]


def test_a_loss_that_never_comes_back_is_one_spike_to_the_end() -> None:
    assert find_spikes([*FLAT[:60], *[3.0] * 30]) == [(60, 30)]


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_a_spike(loss: float) -> None:
    assert find_spikes([*FLAT[:60], loss, *[0.5] * 5]) == [(60, 1)]


def test_small_noise_on_a_very_smooth_loss_is_no_spike() -> None:
    assert find_spikes([1.0] * 60 + [1.07] + [1.0] * 10) == []
    assert find_spikes([1.0] * 60 + [1.09] + [0.99] * 10) == [(60, 1)]


# The study.


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Spikes, list[Result]]:
    """Train every variant for a moment."""
    study = Spikes(steps=8, seeds=1, output=tmp_path_factory.mktemp("study"))
    results = train_all(study, 1)
    write(study, results)
    return study, results


def test_every_variant_has_a_result_and_its_steps(study: tuple[Spikes, list[Result]]) -> None:
    asked, results = study
    assert [result.arm for result in results] == list(RULES)
    for result in results:
        assert result.validation_loss > 0
        with (asked.folder(result) / "steps.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 8
        assert all((row["norm"] != row["norm_used"]) == (row["clipped"] == "True") for row in rows)
    shares = {result.arm: result.clipped_share for result in results}
    assert shares["none"] == 0.0
    assert shares["autoclip"] > 0.0


def test_lightnings_own_clipping_is_the_first_to_differ(study: tuple[Spikes, list[Result]]) -> None:
    asked, results = study
    norms = {result.arm: read_table(asked.folder(result) / "steps.csv") for result in results[:2]}
    assert norms["none"]["norm"][0] == norms["trainer"]["norm"][0]
    assert norms["trainer"]["norm_used"].max() <= 1.0 + 1e-4


def test_figure_and_numbers_are_written(study: tuple[Spikes, list[Result]]) -> None:
    asked, _ = study
    assert (asked.output / "comparison.png").read_bytes().startswith(PNG)
    with (asked.output / "results.csv").open(newline="") as file:
        assert [row["arm"] for row in csv.DictReader(file)] == list(RULES)


def test_the_same_seed_gives_the_same_numbers(study: tuple[Spikes, list[Result]], tmp_path: Path) -> None:
    _, results = study
    again = train_all(Spikes(arms=["zclip"], steps=8, output=tmp_path), 1)
    assert again == [result for result in results if result.arm == "zclip"]


def test_table_tells_what_its_columns_mean(capsys: pytest.CaptureFixture[str]) -> None:
    results = [Result("spam", seed, 0.04, 1.0 + seed, seed, 10, 0.25) for seed in (0, 1)]
    print_table(Spikes(steps=400), results)
    printed = capsys.readouterr().out
    assert "spam      1.500 ± 0.707     0.5 ± 0.7   10 ± 0       25 %" in printed
    assert "4 robust deviations" in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_a_text_of_ones_own(tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_text("all work and no play makes a dull book\n" * 100)
    claim = Spikes(data=text, arms=["none"], steps=2, output=tmp_path / "out")
    claim.check()
    (result,) = train_all(claim, 1)
    assert result.validation_loss > 0
    assert not (tmp_path / "out" / "sums.txt").exists()
