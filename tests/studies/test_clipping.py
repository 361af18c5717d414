"""The study of one bad batch: it is spoiled once, outcomes are judged as defined, and everything promised is written."""

import csv

import pytest
import torch

from studies.claims.clipping import NEEDS_ADAM, RULES, BadBatch, BadBatchAt, Result, count_lost
from studies.common import read_table
from studies.figures import clipping
from studies.figures.clipping import outcome_of, print_table
from studies.report import write
from studies.runner import train_all

PNG = b"\x89PNG\r\n\x1a\n"

# What Lightning and torch say about themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[BadBatch, list[Result]]:
    """Train every rule that works with SGD, with the bad batch after 30 of 60 steps."""
    study = BadBatch(steps=60, seeds=1, output=tmp_path_factory.mktemp("study"))
    results = train_all(study, 1)
    write(study, results)
    return study, results


def test_the_run_is_lost_without_a_rule_and_saved_with_a_bound(study: tuple[BadBatch, list[Result]]) -> None:
    outcomes = {result.arm: result.outcome for result in study[1]}
    assert list(outcomes) == [name for name in RULES if name != NEEDS_ADAM]
    assert {outcomes[name] for name in ("none", "skip", "centralization")} == {"lost"}
    assert {outcomes[name] for name in ("norm", "layerwise", "zclip", "autoclip")} == {"saved"}


def test_one_batch_is_bad(study: tuple[BadBatch, list[Result]]) -> None:
    asked, results = study
    for result in results:
        with (asked.folder(result) / "steps.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        norms = [float(row["norm"]) for row in rows]
        assert len(norms) == 60
        assert norms.index(max(norms[:31])) == asked.bad_step == 30
        assert result.bad_norm == norms[30] > 10 * result.usual_norm
        assert result.used_norm == float(rows[30]["norm_used"])
    used = {result.arm: result.used_norm for result in results}
    assert used["norm"] == pytest.approx(1.0, abs=1e-4)
    assert used["none"] == used["skip"] > 100


def test_figure_and_numbers_are_written(study: tuple[BadBatch, list[Result]]) -> None:
    asked, results = study
    assert (asked.output / "comparison.png").read_bytes().startswith(PNG)
    with (asked.output / "results.csv").open(newline="") as file:
        assert [(row["arm"], float(row["accuracy"])) for row in csv.DictReader(file)] == [
            (result.arm, result.accuracy) for result in results
        ]


def test_the_figure_shows_every_step_of_every_rule(study: tuple[BadBatch, list[Result]]) -> None:
    asked, results = study
    panels = clipping.draw_comparison(asked, results).axes
    assert [axis.get_title("left").strip() for axis in panels] == [RULES[name].text for name in asked.arms]
    for axis, result in zip(panels, results, strict=True):
        losses = read_table(asked.folder(result) / "steps.csv")["loss"]
        assert axis.lines[0].get_ydata() == pytest.approx(losses)
        assert result.outcome in axis.texts[0].get_text()


def test_the_spoiled_sample_is_the_first_one() -> None:
    images, labels = torch.ones(3, 1, 2, 2), torch.tensor([9, 1, 2])
    callback = BadBatchAt(4, 1000.0)
    for step in (3, 4, 5):
        trainer = type("Trainer", (), {"global_step": step})
        callback.on_train_batch_start(trainer, None, [images, labels], 0)
    assert images.flatten(1).mean(1).tolist() == [1000.0, 1.0, 1.0]
    assert labels.tolist() == [0, 1, 2]


def test_steps_lost_are_those_far_above_what_was_usual() -> None:
    usual = [1.0, 2.0] * 30
    assert count_lost([*usual, 99.0, 4.0, 4.1, float("nan"), float("inf"), 1.0], 60) == 3
    assert count_lost([9.0, *[1.0] * 50, 99.0, 3.0], 51) == 1  # only the 50 steps before count


def test_outcomes_of_seeds_that_differ_are_counted() -> None:
    own = [
        Result("norm", seed, None, 1, 9, 1, 0.9, 0.9, 0, word) for seed, word in enumerate(("saved", "lost", "saved"))
    ]
    assert outcome_of(own) == "2 saved, 1 lost"
    assert outcome_of([own[1], own[0], own[1]]) == "2 lost, 1 saved"
    assert outcome_of(own[::2]) == "saved"


def test_table_tells_what_its_columns_mean(capsys: pytest.CaptureFixture[str]) -> None:
    results = [Result("norm", seed, None, 0.8, 440.0, 1.0, 0.95, 0.97, 0, "saved") for seed in (0, 1)]
    print_table(BadBatch(arms=["norm"], seeds=2), results)
    printed = capsys.readouterr().out
    assert "NormClipping(1.0)   saved     0 ± 0        95.0 → 97.0 %   1.00" in printed
    assert "large but finite" in printed
    assert max(map(len, printed.splitlines())) <= 84
    print_table(BadBatch(arms=["norm"], seeds=2, factor=float("nan")), results)
    assert "finite" not in capsys.readouterr().out
