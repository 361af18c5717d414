"""The data-pruning study and its part of the demo: what is compared is comparable, and everything promised is written."""

import csv
import pickle
from pathlib import Path

import numpy as np
import plain_project
import pytest
import torch
from matplotlib.figure import Figure

from lightning_grad.data import load_scores
from studies.claim import Run
from studies.claims.data_pruning import ARMS, RULES, Pruning, Result, build_data, epochs_of, equal, label
from studies.claims.label_errors import LabelErrors, count_found
from studies.common import read_table
from studies.figures import label_errors
from studies.figures.data_pruning import draw_comparison, print_table
from studies.figures.label_errors import draw_found
from studies.report import write
from studies.runner import train_all

PNG = b"\x89PNG\r\n\x1a\n"

# What Lightning and torch say about themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
]


# The study.


def short(output: Path, **settings: object) -> Pruning:
    """Return a study of a moment: an epoch on everything, and one on what is chosen."""
    fixed = {"epochs": 2, "score_epoch": 1, "width": 2, "seeds": 1, "rates": (), "output": output}
    return Pruning(**{**fixed, **settings})


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pruning, list[Result]]:
    """Train every variant for a moment, and draw everything."""
    study = short(tmp_path_factory.mktemp("study"))
    results = train_all(study, 1)
    write(study, results)
    return study, results


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> LabelErrors:
    """Find wrong labels, and draw them."""
    claim = LabelErrors(epochs=2, score_epoch=1, width=2, seeds=1, output=tmp_path_factory.mktemp("errors"))
    write(claim, train_all(claim, 1))
    return claim


def folder_of(study: tuple[Pruning, list[Result]], arm: str) -> Path:
    """Return the folder of a training."""
    return study[0].folder(next(result for result in study[1] if result.arm == arm))


def test_every_variant_has_a_result_at_every_rate(study: tuple[Pruning, list[Result]]) -> None:
    asked, results = study
    expected = [("full", 0.0), *((variant, prune) for prune in (0.5, 0.8) for variant in RULES if variant != "full")]
    assert [(result.variant, result.prune) for result in results] == expected
    assert tuple(label(*each) for each in expected) == ARMS
    assert all(0 < result.test_accuracy <= 1 and result.cpu_seconds > 0 for result in results)
    with (asked.output / "results.csv").open(newline="") as file:
        assert [row["arm"] for row in csv.DictReader(file)] == [result.arm for result in results]


def test_samples_seen_are_those_that_the_table_promises(study: tuple[Pruning, list[Result]]) -> None:
    _, results = study
    seen = {(result.variant, result.prune): result.samples for result in results}
    assert seen["full", 0.0] == 2 * 1400
    assert {seen[variant, 0.5] for variant in ("random", "hard", "easy", "offset", "ccs")} == {1400 + 700}
    assert {seen[variant, 0.8] for variant in ("random", "hard", "easy", "offset", "ccs")} == {1400 + 280}
    assert (seen["rs2", 0.5], seen["rs2", 0.8]) == (2 * 700, 2 * 280)
    assert seen["rs2-equal", 0.5] == pytest.approx(seen["hard", 0.5], abs=2)  # a sample an epoch, rounded
    assert seen["rs2-equal", 0.8] == pytest.approx(seen["hard", 0.8], abs=2)
    assert seen["rs2", 0.5] < seen["infobatch", 0.5] < seen["full", 0.0]


def test_runs_are_the_same_until_they_prune(study: tuple[Pruning, list[Result]]) -> None:
    arms = ("easy 50%", "ccs 50%", "hard 80%", "easy 80%", "ccs 80%")
    first, *others = (load_scores(folder_of(study, arm) / "scores_epoch1.npz").values for arm in ("hard 50%", *arms))
    assert all(values.equal(first) for values in others)


def test_schedules_end_at_zero_however_short_the_epochs(study: tuple[Pruning, list[Result]]) -> None:
    full, hard = (read_table(folder_of(study, arm) / "steps.csv")["lr"] for arm in ("full", "hard 80%"))
    assert (len(full), len(hard)) == (44, 27)
    np.testing.assert_array_equal(hard[:22], full[:22])
    assert all(each[-1] < 0.05 * each.max() for each in (full, hard))


def test_classes_of_the_last_epoch_are_kept(study: tuple[Pruning, list[Result]]) -> None:
    for arm, expected in (("full", 1400), ("hard 50%", 700), ("ccs 80%", 280)):
        assert read_table(folder_of(study, arm) / "classes.csv")["samples"].sum() == expected


@pytest.mark.parametrize("name", ["comparison", "histogram", "scores"])
def test_figures_are_written(study: tuple[Pruning, list[Result]], name: str) -> None:
    asked, _ = study
    assert (asked.output / f"{name}.png").read_bytes().startswith(PNG)


def test_wrong_labels_are_counted_among_the_hardest(errors: LabelErrors) -> None:
    assert (errors.output / "label_errors.png").read_bytes().startswith(PNG)
    with (errors.output / "label_errors.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    folder = errors.folder(Run("el2n", 0))
    scores = load_scores(folder / "scores_epoch1.npz").values
    data = build_data(errors, 0)
    data.setup("fit")
    hardest = scores.argsort(descending=True, stable=True).tolist()
    mislabeled = set(data.flipped.tolist())
    assert [row["order"] for row in rows] == ["el2n"] * 43 + ["random"] * 43
    assert [int(row["looked_at"]) for row in rows] == [*range(0, 421, 10)] * 2
    assert len(mislabeled) == 140
    for row in rows[:43]:
        assert int(row["found"]) == len(set(hardest[: int(row["looked_at"])]) & mislabeled)
    assert list(folder.glob("*_samples.csv"))


def test_random_order_knows_nothing_of_the_wrong_labels(tmp_path: Path) -> None:
    """flip_labels selects with the same seed: the plain order of that seed starts with exactly the wrong labels."""
    shares = [LabelErrors(output=tmp_path).train(Run("random", seed)).share for seed in range(5)]
    assert max(shares) < 0.25


def test_gradient_norms_are_taken_at_the_start_and_later(study: tuple[Pruning, list[Result]]) -> None:
    folder = study[0].output / "scores" / "grand_flip0.1_seed0"
    start, later = (load_scores(folder / f"scores_epoch{epoch}.npz") for epoch in (0, 1))
    assert (start.name, start.epoch, later.epoch) == ("grand", 0, 1)
    assert not start.values.equal(later.values)


def test_the_same_seed_gives_the_same_numbers(study: tuple[Pruning, list[Result]], tmp_path: Path) -> None:
    (again,) = train_all(short(tmp_path, arms=["ccs 50%"]), 1)
    (before,) = [result for result in study[1] if result.arm == "ccs 50%"]
    assert (again.test_accuracy, again.samples) == (before.test_accuracy, before.samples)


def test_with_the_budget_of_steps_all_see_as_many_samples(tmp_path: Path) -> None:
    study = short(tmp_path, arms=["full", "rs2 50%", "hard 50%"], equal_by="steps")
    assert [epochs_of(study, variant, 0.5) for variant in ("full", "rs2", "hard")] == [2, 4, 2]
    assert equal(0.5, study) == 0.25
    assert {result.samples for result in train_all(study, 1)} == {2 * 1400}


# What is printed.


def test_table_tells_what_its_columns_mean(capsys: pytest.CaptureFixture[str]) -> None:
    study = Pruning(seeds=2, flip=0.1, arms=["full", "hard 50%"])
    results = [
        Result(label(variant, prune), seed, None, 0.9, 0.9 + 0.01 * seed, samples, 2.0)
        for variant, prune, samples in (("full", 0.0, 2000), ("hard", 0.5, 1000))
        for seed in (0, 1)
    ]
    print_table(study, results)
    printed = capsys.readouterr().out
    assert "hard      50 %      90.5 ± 0.7 %    1,000          50 %     2.0 s" in printed
    assert "same epochs" in printed
    assert "hard: select once, after 4 of 40 epochs" in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_findings_are_counts_of_both_orders(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = np.arange(1400) < 140
    found = [count_found(Run("el2n", seed), wrong) for seed in (0, 1)]
    found += [count_found(Run("random", seed), np.roll(wrong, 70 * (1 + seed))) for seed in (0, 1)]
    assert [result.share for result in found] == [1.0, 1.0, 0.5, 0.0]
    label_errors.print_table(LabelErrors(), found)
    printed = capsys.readouterr().out
    assert "140                 140.0 ± 0.0            35.0 ± 49.5" in printed
    assert "140 of 1400 labels are wrong" in printed
    axis = Figure().subplots()
    draw_found(axis, found)
    drawn = [line.get_xydata().tolist() for line in axis.lines[:4]]
    assert drawn == [[list(pair) for pair in zip(r.looked_at, r.found, strict=True)] for r in found]


def test_every_mean_is_drawn_where_it_is() -> None:
    study = Pruning(seeds=2, arms=["full", "random 50%", "random 80%"])
    results = [Result("full", seed, None, 1.0, 1.0, 2000, 2.0) for seed in (0, 1)]
    results += [
        Result(label("random", prune), seed, None, 0.9, accuracy, 1000, 2.0)
        for prune in (0.5, 0.8)
        for seed, accuracy in enumerate((0.9, 0.98))
    ]
    figure = draw_comparison(study, results)
    assert len(figure.axes) == 2
    for axis in figure.axes:
        points = [line.get_xydata()[0].tolist() for line in axis.lines if line.get_marker() == "o"]
        assert points == [[1.0, 0], [pytest.approx(0.94), 1]]
        assert [text.get_text() for text in axis.texts] == ["100 %", "50 %", "samples seen"]


# CIFAR-10.


def test_cifar10_from_a_folder(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
        pixels = torch.randint(256, (20, 3072), generator=generator, dtype=torch.uint8)
        (folder / name).write_bytes(pickle.dumps({b"data": pixels.numpy(), b"labels": [*range(10)] * 2}))
    claim = short(tmp_path / "out", data=tmp_path, width=1, limit=60, arms=["hard 50%"], flip=0.1)
    claim.check()
    (result,) = train_all(claim, 1)
    assert result.samples == 54 + 27
    data = build_data(claim, 0)
    data.setup("fit")
    plain = plain_project.CIFAR10(tmp_path, limit=60)
    plain.setup("fit")
    assert (data.train_set.labels != plain.train_set.labels).nonzero().flatten().equal(data.flipped)
    assert (len(data.flipped), data.train_set.augment) == (5, True)
