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
from studies import data_pruning, demo
from studies.data_pruning import (
    RULES,
    Result,
    Study,
    build_data,
    count_found,
    draw_comparison,
    draw_found,
    epochs_of,
    equal,
    find_label_errors,
    look_at_scores,
    parse,
    print_findings,
    print_table,
    read_column,
    run_study,
)

EXAMPLES = Path(plain_project.__file__).parents[1]
PNG = b"\x89PNG\r\n\x1a\n"

# What Lightning and torch say about themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
]


# The study.


def short(output: Path, **settings: object) -> Study:
    """Return a study of a moment: an epoch on everything, and one on what is chosen."""
    fixed = {"epochs": 2, "score_epoch": 1, "width": 2, "output": output, "accelerator": "cpu"}
    return Study(**{**fixed, **settings})


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, list[Result]]:
    """Train every variant for a moment, on some wrong labels, and draw everything."""
    study = short(tmp_path_factory.mktemp("study"), flips=[0.1])
    results = run_study(study)
    find_label_errors(study)
    look_at_scores(study)
    return study, results


def test_every_variant_has_a_result_at_every_rate(study: tuple[Study, list[Result]]) -> None:
    asked, results = study
    expected = [("full", 0.0), *((variant, prune) for prune in (0.5, 0.8) for variant in RULES if variant != "full")]
    assert [(result.variant, result.prune) for result in results] == expected
    assert {(result.flip, result.seed) for result in results} == {(0.1, 0)}
    assert all(0 < result.test_accuracy <= 1 and result.cpu_seconds > 0 for result in results)
    with (asked.output / "results.csv").open(newline="") as file:
        assert [row["variant"] for row in csv.DictReader(file)] == [result.variant for result in results]


def test_samples_seen_are_those_that_the_table_promises(study: tuple[Study, list[Result]]) -> None:
    _, results = study
    seen = {(result.variant, result.prune): result.samples for result in results}
    assert seen["full", 0.0] == 2 * 1400
    assert {seen[variant, 0.5] for variant in ("random", "hard", "easy", "offset", "ccs")} == {1400 + 700}
    assert {seen[variant, 0.8] for variant in ("random", "hard", "easy", "offset", "ccs")} == {1400 + 280}
    assert (seen["rs2", 0.5], seen["rs2", 0.8]) == (2 * 700, 2 * 280)
    assert seen["rs2-equal", 0.5] == pytest.approx(seen["hard", 0.5], abs=2)  # a sample an epoch, rounded
    assert seen["rs2-equal", 0.8] == pytest.approx(seen["hard", 0.8], abs=2)
    assert seen["rs2", 0.5] < seen["infobatch", 0.5] < seen["full", 0.0]


def test_runs_are_the_same_until_they_prune(study: tuple[Study, list[Result]]) -> None:
    asked, _ = study
    scores = [
        load_scores(asked.folder(variant, prune, 0.1, 0) / "scores_epoch1.npz").values
        for variant in ("hard", "easy", "ccs")
        for prune in (0.5, 0.8)
    ]
    alone = load_scores(asked.output / "scores" / "el2n_flip0.1_seed0" / "scores_epoch1.npz").values
    assert all(values.equal(alone) for values in scores)


def test_schedules_end_at_zero_however_short_the_epochs(study: tuple[Study, list[Result]]) -> None:
    asked, _ = study
    rates = {key: read_column(asked.folder(*key, 0.1, 0) / "steps.csv", "lr") for key in (("full", 0.0), ("hard", 0.8))}
    assert (len(rates["full", 0.0]), len(rates["hard", 0.8])) == (44, 27)
    np.testing.assert_array_equal(rates["hard", 0.8][:22], rates["full", 0.0][:22])
    assert all(each[-1] < 0.05 * each.max() for each in rates.values())


def test_classes_of_the_last_epoch_are_kept(study: tuple[Study, list[Result]]) -> None:
    asked, _ = study
    for variant, prune, expected in (("full", 0.0, 1400), ("hard", 0.5, 700), ("ccs", 0.8, 280)):
        assert read_column(asked.folder(variant, prune, 0.1, 0) / "classes.csv", "samples").sum() == expected


@pytest.mark.parametrize("name", ["comparison", "label_errors", "histogram", "scores"])
def test_figures_are_written(study: tuple[Study, list[Result]], name: str) -> None:
    asked, _ = study
    assert (asked.output / f"{name}.png").read_bytes().startswith(PNG)


def test_wrong_labels_are_counted_among_the_hardest(study: tuple[Study, list[Result]]) -> None:
    asked, _ = study
    with (asked.output / "label_errors.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    scores = load_scores(asked.output / "scores" / "el2n_flip0.1_seed0" / "scores_epoch1.npz").values
    data = build_data(asked, 0.1, 0)
    data.setup("fit")
    hardest = scores.argsort(descending=True, stable=True).tolist()
    mislabeled = set(data.flipped.tolist())
    assert [row["order"] for row in rows] == ["el2n"] * 43 + ["random"] * 43
    assert [int(row["looked_at"]) for row in rows] == [*range(0, 421, 10)] * 2
    assert {(int(row["total"]), int(row["wrong"])) for row in rows} == {(1400, 140)}
    for row in rows[:43]:
        assert int(row["found"]) == len(set(hardest[: int(row["looked_at"])]) & mislabeled)
    assert 0 < int(rows[-1]["found"]) < int(rows[42]["found"])
    assert list(asked.output.glob("scores/el2n_flip0.1_seed0/*_samples.csv"))


def test_gradient_norms_are_taken_at_the_start_and_later(study: tuple[Study, list[Result]]) -> None:
    asked, _ = study
    folder = asked.output / "scores" / "grand_flip0.1_seed0"
    start, later = (load_scores(folder / f"scores_epoch{epoch}.npz") for epoch in (0, 1))
    assert (start.name, start.epoch, later.epoch) == ("grand", 0, 1)
    assert not start.values.equal(later.values)


def test_the_same_seed_gives_the_same_numbers(study: tuple[Study, list[Result]], tmp_path: Path) -> None:
    _, results = study
    (again,) = run_study(short(tmp_path, variants=["ccs"], prunes=[0.5], flips=[0.1]))
    (before,) = [r for r in results if (r.variant, r.prune, r.flip) == ("ccs", 0.5, 0.1)]
    assert (again.test_accuracy, again.samples) == (before.test_accuracy, before.samples)


def test_with_the_budget_of_steps_all_see_as_many_samples(tmp_path: Path) -> None:
    study = short(tmp_path, variants=["full", "rs2", "hard"], prunes=[0.5], flips=[0.0], budget="steps")
    assert [epochs_of(study, variant, 0.5) for variant in ("full", "rs2", "hard")] == [2, 4, 2]
    assert equal(0.5, study) == 0.25
    assert {result.samples for result in run_study(study)} == {2 * 1400}


# What is printed.


def test_table_tells_what_its_columns_mean(capsys: pytest.CaptureFixture[str]) -> None:
    study = Study(seeds=2, flips=[0.1], prunes=[0.5], variants=["full", "hard"])
    results = [
        Result(variant, prune, 0.1, seed, 0.9 + 0.01 * seed, samples, 2.0)
        for variant, prune, samples in (("full", 0.0, 2000), ("hard", 0.5, 1000))
        for seed in (0, 1)
    ]
    print_table(results, study)
    printed = capsys.readouterr().out
    assert "hard      50 %      90.5 ± 0.7 %    1,000          50 %     2.0 s" in printed
    assert "same epochs" in printed
    assert "hard: select once, after 4 of 40 epochs" in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_findings_are_counts_of_both_orders(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = np.arange(1400) < 140
    findings = [finding for seed in (0, 1) for finding in count_found(wrong, "el2n", seed)]
    findings += [finding for seed in (0, 1) for finding in count_found(np.roll(wrong, 70 * (1 + seed)), "random", seed)]
    print_findings(findings)
    printed = capsys.readouterr().out
    assert "140                 140.0 ± 0.0            35.0 ± 49.5" in printed
    assert "140 of 1400 labels are wrong" in printed
    axis = Figure().subplots()
    draw_found(axis, findings)
    drawn = [line.get_xydata().tolist() for line in axis.lines[:4]]
    assert drawn == [
        [[f.looked_at, f.found] for f in findings if (f.order, f.seed) == key]
        for key in (("el2n", 0), ("el2n", 1), ("random", 0), ("random", 1))
    ]


def test_every_mean_is_drawn_where_it_is() -> None:
    study = Study(seeds=2, flips=[0.0], prunes=[0.5, 0.8], variants=["full", "random"])
    results = [Result("full", 0.0, 0.0, seed, 1.0, 2000, 2.0) for seed in (0, 1)]
    results += [
        Result("random", prune, 0.0, seed, accuracy, 1000, 2.0)
        for prune in (0.5, 0.8)
        for seed, accuracy in enumerate((0.9, 0.98))
    ]
    figure = draw_comparison(study, results)
    assert len(figure.axes) == 2
    for axis in figure.axes:
        points = [line.get_xydata()[0].tolist() for line in axis.lines if line.get_marker() == "o"]
        assert points == [[1.0, 0], [pytest.approx(0.94), 1]]
        assert [text.get_text() for text in axis.texts] == ["100 %", "50 %", "samples seen"]


# The command line and the demo.


def test_command_line() -> None:
    assert parse([]) == Study()
    options = ["--variants", "full", "hard", "--prunes", "0.3", "--flips", "0", "--seeds", "3", "--epochs", "20"]
    study = parse([*options, "--score-epoch", "2", "--budget", "steps", "--wandb", "--accelerator", "cpu"])
    assert study == Study(["full", "hard"], [0.3], [0.0], 3, 20, 2, budget="steps", wandb="offline", accelerator="cpu")


def test_cifar10_from_a_folder(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
        pixels = torch.randint(256, (20, 3072), generator=generator, dtype=torch.uint8)
        (folder / name).write_bytes(pickle.dumps({b"data": pixels.numpy(), b"labels": [*range(10)] * 2}))
    rules, output = ["hard"], tmp_path / "out"
    options = f"--cifar10 {tmp_path} --epochs 2 --score-epoch 1 --width 1 --prunes 0.5 --accelerator cpu --limit 60"
    data_pruning.main([*options.split(), "--output", str(output), "--variants", *rules])
    assert (output / "scores.png").read_bytes().startswith(PNG)
    with (output / "results.csv").open(newline="") as file:
        assert [(row["flip"], row["variant"]) for row in csv.DictReader(file)] == [
            (flip, rule) for flip in ("0.0", "0.1") for rule in rules
        ]
    data = build_data(parse(options.split()), 0.1, 0)
    data.setup("fit")
    plain = plain_project.CIFAR10(tmp_path, limit=60)
    plain.setup("fit")
    assert (data.train_set.labels != plain.train_set.labels).nonzero().flatten().equal(data.flipped)
    assert (len(data.flipped), data.train_set.augment) == (5, True)


def test_part_of_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo.find_label_errors(tmp_path, seeds=1)
    printed = capsys.readouterr().out
    assert "140 of 1400 labels are wrong\n" in printed
    assert max(map(len, printed.splitlines())) <= 88
    assert {path.name for path in tmp_path.iterdir()} == {"label_errors.png", "label_errors.csv", "scores"}
