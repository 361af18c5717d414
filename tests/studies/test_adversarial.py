"""The adversarial study, its part of the demo, and the YAML: what is compared is comparable, and all is written."""

import csv
import math
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import plain_project
import pytest
import torch
from plain_project.schedules import with_schedule
from torch import nn

from lightning_grad.callbacks import AccuracyGradientLR, AdversarialEvaluation, AdversarialTraining
from studies import adversarial, demo
from studies.adversarial import parse, print_tables, run_study
from studies.adversarial_figures import (
    COLOURS,
    RIGHT,
    WRONG,
    attack_images,
    draw_digits,
    draw_rates,
    draw_robustness,
)
from studies.adversarial_trainings import (
    ATTACKS,
    CLEAN,
    OURS,
    ROBUST,
    SCHEDULES,
    STRENGTHS,
    Reached,
    Result,
    Study,
    build_data,
    build_module,
    epochs_to,
    pixels,
    reach,
    read_column,
    speed_ups,
    train,
    tune,
)

EXAMPLES = Path(plain_project.__file__).parents[1]
PNG = b"\x89PNG\r\n\x1a\n"
STEPS = 11  # of an epoch: 1400 images in batches of 128

# What Lightning and torch say about themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
]


# The study.


def short(output: Path, **settings: object) -> Study:
    """Return a study of a moment."""
    fixed = {"rates": (0.1,), "epochs": 3, "width": 32, "output": output, "accelerator": "cpu"}
    return Study(**{**fixed, **settings})


def silent(*_: object) -> None:
    """Show no progress."""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, list[Result]]:
    """Train on every attack for a moment, and draw everything."""
    study = short(tmp_path_factory.mktemp("study"), schedules=("constant", OURS))
    return study, run_study(study)


def test_every_training_has_a_result(study: tuple[Study, list[Result]]) -> None:
    asked, results = study
    expected = [(attack, schedule) for attack in ("plain", "fgsm", "pgd") for schedule in ("constant", OURS)]
    assert [(result.attack, result.schedule) for result in results] == expected
    assert all(0 < result.clean_accuracy <= 1 and result.cpu_seconds > 0 for result in results)
    assert all(0 < result.robust_accuracy < result.clean_accuracy for result in results)
    for name in ("results", "reached"):
        with (asked.output / f"{name}.csv").open(newline="") as file:
            assert [(row["attack"], row["schedule"]) for row in csv.DictReader(file)] == expected


def test_training_on_attacks_makes_robust(study: tuple[Study, list[Result]]) -> None:
    _, results = study
    robust = {result.attack: result.robust_accuracy for result in results if result.schedule == "constant"}
    assert min(robust["fgsm"], robust["pgd"]) > robust["plain"] + 0.05


def test_result_is_judged_by_what_its_training_is_for(study: tuple[Study, list[Result]]) -> None:
    asked, results = study
    for result in results:
        folder = asked.folder(result.attack, result.schedule, 0.1, 0)
        values = {key: read_column(folder, key) for key in (CLEAN, ROBUST)}
        assert values[CLEAN].mean() > values[ROBUST].mean()
        assert result.validation == pytest.approx(values[CLEAN if result.attack == "plain" else ROBUST].mean())


def test_a_rate_that_is_not_cut_is_constant(study: tuple[Study, list[Result]]) -> None:
    _, results = study
    for attack in ("plain", "fgsm", "pgd"):
        constant, ours = (
            next(r for r in results if (r.attack, r.schedule) == (attack, name)) for name in ("constant", OURS)
        )
        assert replace(ours, schedule="constant", cpu_seconds=constant.cpu_seconds) == constant


@pytest.mark.parametrize("name", ["robustness", "digits", "rates", "comparison"])
def test_figures_are_written(study: tuple[Study, list[Result]], name: str) -> None:
    asked, _ = study
    assert (asked.output / f"{name}.png").read_bytes().startswith(PNG)


def test_robustness_is_drawn_as_it_was_written(study: tuple[Study, list[Result]]) -> None:
    asked, results = study
    axis, costs = draw_robustness(asked, tune(results)).axes
    for attack, line in zip(asked.attacks, axis.lines, strict=False):
        (own,) = [result for result in results if (result.attack, result.schedule) == (attack, OURS)]
        folder = asked.folder(attack, OURS, own.rate, own.seed)
        written = {key: read_column(folder, key, "strengths") for key in ("epsilon", "accuracy")}
        assert line.get_xdata().tolist() == pytest.approx(written["epsilon"].tolist())
        assert line.get_ydata().tolist() == pytest.approx((100 * written["accuracy"]).tolist())
        assert written["epsilon"].tolist() == [0.0, *(strength * asked.radius for strength in STRENGTHS)]
        assert written["accuracy"][0] == own.clean_accuracy
        assert written["accuracy"][STRENGTHS.index(1) + 1] == own.robust_accuracy
        assert written["accuracy"][-1] < own.clean_accuracy
    assert costs.patches[0].get_width() == 1


def test_captions_are_answers_in_the_colour_of_the_last(study: tuple[Study, list[Result]]) -> None:
    asked, results = study
    axes = np.array(draw_digits(asked, tune(results)).axes).reshape(7, 10)
    assert [axis.get_xlabel() for axis in axes[0]] == [*"0123456789"]
    for row in axes[2::2]:
        answers = [(axis.get_xlabel().split(" → "), axis.xaxis.label.get_color()) for axis in row]
        assert [colour for _, colour in answers] == [
            RIGHT if after == label else WRONG for label, ((_, after), _) in zip("0123456789", answers, strict=True)
        ]
    assert {axis.xaxis.label.get_color() for axis in axes[2]} != {RIGHT}
    with (asked.output / "digits.csv").open(newline="") as file:
        written = [f"{row['before']} → {row['after']}" for row in csv.DictReader(file)]
    assert written == [axis.get_xlabel() for row in axes[2::2] for axis in row]


def test_changes_stay_within_epsilon_in_pixels(tmp_path: Path) -> None:
    study = short(tmp_path, epsilon=0.1)
    data = build_data(study, 0)
    images, labels = (part[:20] for part in data.val_set.tensors)
    attacked, before, after = attack_images(study, build_module(study, OURS, 0.1), images, labels, pixels(data))
    seen = attacked * data.std + data.mean
    assert ((attacked - images) * data.std).abs().max().item() == pytest.approx(0.1, abs=1e-5)
    assert -1e-5 < seen.min() < 1e-5 < seen.max() < 1 + 1e-5
    assert len(before) == len(after) == 20


def test_without_epsilon_all_attacks_are_plain_training(tmp_path: Path) -> None:
    study = short(tmp_path, epsilon=0.0, epochs=1)
    plain, fgsm = (train(study, attack, "constant", 0.1, 0, silent) for attack in ("plain", "fgsm"))
    assert plain.robust_accuracy == plain.clean_accuracy
    assert replace(fgsm, attack="plain", cpu_seconds=plain.cpu_seconds) == plain


def test_cuts_are_counted_and_marked(tmp_path: Path) -> None:
    study = short(tmp_path, attacks=("plain",), schedules=(OURS,), rates=(0.3,), epochs=14)
    result = train(study, "plain", OURS, 0.3, 0, silent)
    rates = read_column(study.folder("plain", OURS, 0.3, 0), "lr")
    places = (np.flatnonzero(np.diff(rates)) + 1).tolist()
    np.testing.assert_allclose(rates[places], 0.3 * 0.8 ** np.arange(1, len(places) + 1))
    assert places
    assert result.cuts in (len(places), len(places) + 1)  # one after the last epoch changes nothing any more
    for axis in draw_rates(study, tune([result])).axes:
        cuts = [line.get_xdata()[0] for line in axis.lines if len(set(line.get_xdata())) == 1]
        assert cuts == places


def test_the_same_seed_gives_the_same_numbers_and_another_others(
    study: tuple[Study, list[Result]], tmp_path: Path
) -> None:
    _, results = study
    (before,) = [result for result in results if (result.attack, result.schedule) == ("fgsm", "constant")]
    again, other = (train(short(tmp_path), "fgsm", "constant", 0.1, seed, silent) for seed in (0, 1))
    assert replace(again, cpu_seconds=before.cpu_seconds) == before
    assert (other.validation, other.robust_accuracy) != (before.validation, before.robust_accuracy)


# What is compared.


def made_up(schedule: str, rate: float, seed: int, validation: float, attack: str = "pgd") -> Result:
    """Return a result of which only its end in the validation matters."""
    return Result(
        attack, schedule, rate, seed, validation, 0.9, 0.5 + 0.1 * (schedule == OURS), 2 * (schedule == OURS), 3.0
    )


def write_epochs(study: Study, result: Result, accuracies: list[float]) -> None:
    """Write what a training would have recorded."""
    folder = study.folder(result.attack, result.schedule, result.rate, result.seed)
    folder.mkdir(parents=True)
    rows = [[number, 0.1, 0.99, accuracy] for number, accuracy in enumerate(accuracies, 1)]
    with (folder / "epochs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["epoch", "lr", CLEAN, ROBUST], *rows])


def test_rate_is_chosen_by_the_mean_over_seeds() -> None:
    ends = {
        ("constant", 0.1): (0.5, 0.7),
        ("constant", 0.3): (0.2, 0.9),
        (OURS, 0.1): (0.1, 0.2),
        (OURS, 0.3): (0.3, 0.4),
    }
    results = [made_up(*training, seed, end) for training, values in ends.items() for seed, end in enumerate(values)]
    chosen = tune(results)
    assert {key: [result.rate for result in own] for key, own in chosen.items()} == {
        ("pgd", "constant"): [0.1, 0.1],
        ("pgd", OURS): [0.3, 0.3],
    }


def compared(output: Path) -> tuple[Study, list[Result]]:
    """Return a study of two seeds: AccuracyGradientLR arrives sooner with one and never with the other."""
    study = Study(("pgd",), ("constant", OURS), rates=(0.1,), seeds=2, epochs=6, output=output)
    ends = [("constant", 0, 0.5), (OURS, 0, 0.9), ("constant", 1, 0.6), (OURS, 1, 0.1)]
    results = [made_up(schedule, 0.1, seed, end) for schedule, seed, end in ends]
    curves = [[0.1, 0.2, 0.3, 0.45, 0.5, 0.55], [0.4, 0.5, 0.6, 0.6, 0.6, 0.6]]
    curves += [[0.1, 0.3, 0.5, 0.6, 0.6, 0.6], [0.58] * 6]
    for result, curve in zip(results, curves, strict=True):
        write_epochs(study, result, curve)
    return study, results


def test_target_is_that_of_the_same_seed(tmp_path: Path) -> None:
    study, results = compared(tmp_path)
    reached = reach(study, tune(results))
    assert reached == [
        Reached("pgd", "constant", 0.1, 0, 0.49, 6.0),
        Reached("pgd", "constant", 0.1, 1, 0.588, 6.0),
        Reached("pgd", OURS, 0.1, 0, 0.49, 3.0),
        Reached("pgd", OURS, 0.1, 1, 0.588, math.inf),
    ]
    assert speed_ups(reached, "pgd", "constant") == [2.0, 0.0]


def test_speed_up_where_nobody_arrives_is_one() -> None:
    both = [Reached("pgd", schedule, 0.1, 0, 0.9, math.inf) for schedule in ("linear", OURS)]
    assert speed_ups(both, "pgd", "linear") == [1.0]
    alone = [both[0], replace(both[1], epochs=7.0)]
    assert speed_ups(alone, "pgd", "linear") == [math.inf]


def test_one_high_value_reaches_nothing() -> None:
    assert epochs_to(0.6, [0.1, 0.9, 0.1, 0.1, 0.7, 0.7, 0.7]) == 7
    assert epochs_to(0.6, [0.7, 0.7]) == math.inf


def test_tables_tell_what_their_columns_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study, results = compared(tmp_path)
    print_tables(results, study)
    printed = capsys.readouterr().out
    assert "pgd      constant            0.1    6 (6-6)           90.0 ± 0.0   50.0 ± 0.0   1.0" in printed
    assert f"pgd      {OURS}   0.1    never (3-never)   90.0 ± 0.0   60.0 ± 0.0   1.0   2.0" in printed
    assert "pgd      constant   1.00 (0.00-2.00)   1 of 2      +10.0 ± 0.0" in printed
    assert "without and with PGD (20 steps, epsilon 0.15)" in printed
    assert max(map(len, printed.splitlines())) <= 92


def test_without_a_constant_rate_the_first_schedule_sets_the_target() -> None:
    assert Study(schedules=("linear", OURS)).reference == "linear"
    assert Study(schedules=(OURS, "constant")).reference == "constant"


# The plain project.


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [1.0, 0.75, 0.5, 0.25, 0.05]),
        ("piecewise", [1.0, 1.0, 0.1, 0.01, 0.01]),
    ],
)
def test_schedules_of_the_plain_project(schedule: str, expected: list[float]) -> None:
    assert [rates_of(schedule)[step] for step in (0, 5, 10, 15, 19)] == pytest.approx(expected)


def test_one_cycle_of_the_plain_project_rises_and_falls() -> None:
    rates = rates_of("one-cycle")
    top = int(np.argmax(rates))
    assert 3 <= top <= 7
    assert rates[top] == pytest.approx(1.0, rel=0.05)
    assert rates[0] == pytest.approx(1 / 25)
    assert rates[-1] < 1e-3
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)


def rates_of(schedule: str, total: int = 20) -> list[float]:
    """Return the rate of each of so many steps, with a peak rate of 1."""
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0, momentum=0.9)
    built = with_schedule(optimizer, schedule, total, 0.0)
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if built is not optimizer:
            built["lr_scheduler"]["scheduler"].step()
    return rates


def test_digits_say_how_they_are_standardised() -> None:
    data = plain_project.Digits(seed=3)
    data.setup("fit")
    seen = data.train_set.tensors[0] * data.std + data.mean
    assert (seen.min().item(), seen.max().item()) == pytest.approx((0.0, 1.0), abs=1e-6)


# The command line, the demo and the YAML.


def test_command_line() -> None:
    assert parse([]) == Study()
    options = [
        "--attacks",
        "fgsm",
        "--schedules",
        "linear",
        OURS,
        "--rates",
        "0.2",
        "0.4",
        "--seeds",
        "3",
        "--epochs",
        "9",
    ]
    study = parse([*options, "--epsilon", "0.2", "--wandb", "--accelerator", "cpu"])
    assert study == Study(["fgsm"], ["linear", OURS], [0.2, 0.4], 3, 9, 0.2, wandb="offline", accelerator="cpu")
    assert (Study().radius, study.radius, parse(["--cifar10", "x"]).radius) == (0.15, 0.2, 8 / 255)
    assert set(COLOURS) == set(SCHEDULES)


def test_cifar10_from_a_folder(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
        pixels = torch.randint(256, (20, 3072), generator=generator, dtype=torch.uint8)
        (folder / name).write_bytes(pickle.dumps({b"data": pixels.numpy(), b"labels": [*range(10)] * 2}))
    output = tmp_path / "out"
    options = f"--cifar10 {tmp_path} --epochs 1 --width 1 --rates 0.1 --accelerator cpu --limit 40 --attacks fgsm"
    adversarial.main([*options.split(), "--schedules", "one-cycle", "--output", str(output)])
    assert (output / "digits.png").read_bytes().startswith(PNG)
    with (output / "results.csv").open(newline="") as file:
        assert [(row["attack"], row["schedule"]) for row in csv.DictReader(file)] == [("fgsm", "one-cycle")]


def test_part_of_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Study] = []

    def run_short(study: Study) -> list[Result]:
        asked.append(study)
        return run_study(replace(study, seeds=1))

    monkeypatch.setattr(adversarial, "run_study", run_short)
    demo.attack_inputs(tmp_path, epochs=1)
    assert asked[0].seeds == 3
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines() if " ± " in line or "seed" not in line]
    assert [row[0] for row in rows if row and row[0] in ATTACKS] == ["plain", "fgsm", "pgd"]
    assert max(map(len, printed.splitlines())) <= 82
    for name in ("robustness.png", "digits.png", "rates.png", "results.csv"):
        assert f"adversarial/{name} " in demo.PLACES
        assert (tmp_path / name).is_file()
    assert not (tmp_path / "comparison.png").exists(), "one schedule is not compared"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # LightningCLI's use of jsonargparse
def test_yaml_runs_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jsonargparse")
    from train import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    quick = ["--trainer.max_epochs=2", "--model.init_args.width=2", "--trainer.limit_train_batches=3"]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    cli = main(["fit", "--config", str(EXAMPLES / "adversarial.yaml"), *quick, *quiet])
    kinds = (AdversarialTraining, AdversarialEvaluation, AccuracyGradientLR)
    training, evaluation, rule = (
        next(callback for callback in cli.trainer.callbacks if isinstance(callback, kind)) for kind in kinds
    )
    assert (training.epsilon, evaluation.epsilon, rule.monitor) == (0.15, 0.15, ROBUST)
    assert {CLEAN, ROBUST} <= cli.trainer.callback_metrics.keys()
    space = (cli.datamodule.mean, cli.datamodule.std)
    for each in (training, evaluation):
        assert (each.mean, each.std) == pytest.approx(space, abs=1e-4)
    written = {path.name for path in tmp_path.glob("runs/adversarial_yaml/version_0/*")}
    assert {"accuracy_gradient_lr.png", "accuracy_gradient_lr.csv"} <= written
