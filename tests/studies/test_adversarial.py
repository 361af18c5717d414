"""The adversarial study, its part of the demo, and the YAML: what is compared is comparable, and all is written."""

import csv
import math
import pickle
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import plain_project
import pytest
import torch
from plain_project.schedules import with_schedule
from torch import nn

from lightning_grad.callbacks import AccuracyGradientLR, AdversarialEvaluation, AdversarialTraining
from studies.claims.adversarial import (
    ATTACKS,
    CLEAN,
    OURS,
    ROBUST,
    SCHEDULES,
    STRENGTHS,
    AccelAT,
    Adversarial,
    Result,
    build_data,
    build_module,
    epochs_to,
    pixels,
)
from studies.common import read_table
from studies.figures.adversarial import (
    COLOURS,
    RIGHT,
    WRONG,
    Reached,
    attack_images,
    by_training,
    draw_digits,
    draw_rates,
    draw_robustness,
    print_table,
    reach,
    speed_ups,
)
from studies.report import write
from studies.runner import train_all
from studies.verdict import compare

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


def product(attacks: Sequence[str], schedules: Sequence[str]) -> list[str]:
    """Return the arms of attacks and schedules."""
    return [f"{attack} {schedule}" for attack in attacks for schedule in schedules]


def short(output: Path, arms: Sequence[str], **settings: object) -> Adversarial:
    """Return a study of a moment."""
    fixed = {"rates": (0.1,), "epochs": 3, "width": 32, "output": output, "seeds": 1}
    return AccelAT(arms=arms, **{**fixed, **settings})


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Adversarial, list[Result]]:
    """Train on every attack for a moment, and draw everything."""
    study = short(tmp_path_factory.mktemp("study"), product(ATTACKS, ("constant", OURS)))
    results = train_all(study, 1)
    write(study, results)
    return study, results


def test_every_training_has_a_result(study: tuple[Adversarial, list[Result]]) -> None:
    asked, results = study
    expected = [(attack, schedule) for attack in ("plain", "fgsm", "pgd") for schedule in ("constant", OURS)]
    assert [(result.attack, result.schedule) for result in results] == expected
    assert all(0 < result.clean_accuracy <= 1 and result.cpu_seconds > 0 for result in results)
    assert all(0 < result.robust_accuracy < result.clean_accuracy for result in results)
    for name in ("results", "reached"):
        with (asked.output / f"{name}.csv").open(newline="") as file:
            rows = [row.get("arm", f"{row.get('attack')} {row.get('schedule')}") for row in csv.DictReader(file)]
            assert rows == [" ".join(each) for each in expected]


def test_training_on_attacks_makes_robust(study: tuple[Adversarial, list[Result]]) -> None:
    _, results = study
    robust = {result.attack: result.robust_accuracy for result in results if result.schedule == "constant"}
    assert min(robust["fgsm"], robust["pgd"]) > robust["plain"] + 0.05


def test_result_is_judged_by_what_its_training_is_for(study: tuple[Adversarial, list[Result]]) -> None:
    asked, results = study
    for result in results:
        values = {key: read_table(asked.folder(result) / "epochs.csv")[key] for key in (CLEAN, ROBUST)}
        assert values[CLEAN].mean() > values[ROBUST].mean()
        judged = values[CLEAN if result.attack == "plain" else ROBUST]
        assert result.validation == pytest.approx(judged.mean())
        assert result.curve == pytest.approx(judged.tolist())


def test_a_rate_that_is_not_cut_is_constant(study: tuple[Adversarial, list[Result]]) -> None:
    _, results = study
    for attack in ("plain", "fgsm", "pgd"):
        constant, ours = (
            next(r for r in results if (r.attack, r.schedule) == (attack, name)) for name in ("constant", OURS)
        )
        assert replace(ours, arm=constant.arm, cpu_seconds=constant.cpu_seconds) == constant


@pytest.mark.parametrize("name", ["robustness", "digits", "rates", "comparison"])
def test_figures_are_written(study: tuple[Adversarial, list[Result]], name: str) -> None:
    asked, _ = study
    assert (asked.output / f"{name}.png").read_bytes().startswith(PNG)


def test_robustness_is_drawn_as_it_was_written(study: tuple[Adversarial, list[Result]]) -> None:
    asked, results = study
    axis, costs = draw_robustness(asked, by_training(results)).axes
    for attack, line in zip(asked.attacks, axis.lines, strict=False):
        (own,) = [result for result in results if (result.attack, result.schedule) == (attack, OURS)]
        folder = asked.folder(own)
        written = {key: read_table(folder / "strengths.csv")[key] for key in ("epsilon", "accuracy")}
        assert line.get_xdata().tolist() == pytest.approx(written["epsilon"].tolist())
        assert line.get_ydata().tolist() == pytest.approx((100 * written["accuracy"]).tolist())
        assert written["epsilon"].tolist() == [0.0, *(strength * asked.radius for strength in STRENGTHS)]
        assert written["accuracy"][0] == own.clean_accuracy
        assert written["accuracy"][STRENGTHS.index(1) + 1] == own.robust_accuracy
        assert written["accuracy"][-1] < own.clean_accuracy
    assert costs.patches[0].get_width() == 1


def test_captions_are_answers_in_the_colour_of_the_last(study: tuple[Adversarial, list[Result]]) -> None:
    asked, results = study
    axes = np.array(draw_digits(asked, by_training(results)).axes).reshape(7, 10)
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
    study = short(tmp_path, [], epsilon=0.1)
    data = build_data(study, 0)
    images, labels = (part[:20] for part in data.val_set.tensors)
    attacked, before, after = attack_images(study, build_module(study, OURS, 0.1), images, labels, pixels(data))
    seen = attacked * data.std + data.mean
    assert ((attacked - images) * data.std).abs().max().item() == pytest.approx(0.1, abs=1e-5)
    assert -1e-5 < seen.min() < 1e-5 < seen.max() < 1 + 1e-5
    assert len(before) == len(after) == 20


def test_without_epsilon_all_attacks_are_plain_training(tmp_path: Path) -> None:
    study = short(tmp_path, ["plain constant", "fgsm constant"], epsilon=0.0, epochs=1)
    plain, fgsm = train_all(study, 1)
    assert plain.robust_accuracy == plain.clean_accuracy
    assert replace(fgsm, arm=plain.arm, cpu_seconds=plain.cpu_seconds) == plain


def test_cuts_are_counted_and_marked(tmp_path: Path) -> None:
    study = short(tmp_path, [f"plain {OURS}"], rates=(0.3,), epochs=14)
    (result,) = train_all(study, 1)
    rates = read_table(study.folder(result) / "epochs.csv")["lr"]
    places = (np.flatnonzero(np.diff(rates)) + 1).tolist()
    np.testing.assert_allclose(rates[places], 0.3 * 0.8 ** np.arange(1, len(places) + 1))
    assert places
    assert result.cuts in (len(places), len(places) + 1)  # one after the last epoch changes nothing any more
    for axis in draw_rates(study, by_training([result])).axes:
        cuts = [line.get_xdata()[0] for line in axis.lines if len(set(line.get_xdata())) == 1]
        assert cuts == places


def test_the_same_seed_gives_the_same_numbers_and_another_others(
    study: tuple[Adversarial, list[Result]], tmp_path: Path
) -> None:
    _, results = study
    (before,) = [result for result in results if result.arm == "fgsm constant"]
    again, other = train_all(short(tmp_path, ["fgsm constant"]), 2)
    assert replace(again, cpu_seconds=before.cpu_seconds) == before
    assert (other.validation, other.robust_accuracy) != (before.validation, before.robust_accuracy)


# What is compared.


def made_up(schedule: str, seed: int, validation: float, curve: list[float]) -> Result:
    """Return a result of which only its validation matters."""
    ours = schedule == OURS
    return Result(f"pgd {schedule}", seed, 0.1, validation, 0.9, 0.5 + 0.1 * ours, 2 * ours, 3.0, curve)


def compared() -> tuple[AccelAT, list[Result]]:
    """Return a study of two seeds: AccuracyGradientLR arrives sooner with one and never with the other."""
    study = AccelAT(arms=product(["pgd"], ("constant", OURS)), rates=(0.1,), seeds=2, epochs=6)
    results = [
        made_up("constant", 0, 0.5, [0.1, 0.2, 0.3, 0.45, 0.5, 0.55]),
        made_up(OURS, 0, 0.9, [0.4, 0.5, 0.6, 0.6, 0.6, 0.6]),
        made_up("constant", 1, 0.6, [0.1, 0.3, 0.5, 0.6, 0.6, 0.6]),
        made_up(OURS, 1, 0.1, [0.58] * 6),
    ]
    return study, results


def test_target_is_that_of_the_same_seed() -> None:
    study, results = compared()
    reached = reach(study, by_training(results))
    assert reached == [
        Reached("pgd", "constant", 0.1, 0, 0.49, 6.0),
        Reached("pgd", "constant", 0.1, 1, 0.588, 6.0),
        Reached("pgd", OURS, 0.1, 0, 0.49, 3.0),
        Reached("pgd", OURS, 0.1, 1, 0.588, math.inf),
    ]
    assert speed_ups(reached, "pgd", "constant") == [2.0, 0.0]


def test_the_claim_compares_epochs_under_the_same_attack() -> None:
    study, results = compared()
    (comparison,) = compare(study, results)
    assert (comparison.arm, comparison.reference) == (f"pgd {OURS}", "pgd constant")
    assert comparison.differences == [3.0, -math.inf]
    arms = product(ATTACKS, SCHEDULES)
    pairs = AccelAT().comparisons()
    assert {(own.split()[0], other.split()[0]) for own, other in pairs} == {("fgsm", "fgsm"), ("pgd", "pgd")}
    assert len(pairs) == 8
    assert list(AccelAT().arms) == arms


def test_speed_up_where_nobody_arrives_is_one() -> None:
    both = [Reached("pgd", schedule, 0.1, 0, 0.9, math.inf) for schedule in ("linear", OURS)]
    assert speed_ups(both, "pgd", "linear") == [1.0]
    alone = [both[0], replace(both[1], epochs=7.0)]
    assert speed_ups(alone, "pgd", "linear") == [math.inf]


def test_one_high_value_reaches_nothing() -> None:
    assert epochs_to(0.6, [0.1, 0.9, 0.1, 0.1, 0.7, 0.7, 0.7]) == 7
    assert epochs_to(0.6, [0.7, 0.7]) == math.inf


def test_tables_tell_what_their_columns_mean(capsys: pytest.CaptureFixture[str]) -> None:
    study, results = compared()
    print_table(study, results)
    printed = capsys.readouterr().out
    assert "pgd      constant            0.1    6 (6-6)           90.0 ± 0.0   50.0 ± 0.0   1.0" in printed
    assert f"pgd      {OURS}   0.1    never (3-never)   90.0 ± 0.0   60.0 ± 0.0   1.0   2.0" in printed
    assert "pgd      constant   1.00 (0.00-2.00)   1 of 2      +10.0 ± 0.0" in printed
    assert "without and with PGD (20 steps, epsilon 0.15)" in printed
    assert max(map(len, printed.splitlines())) <= 92


def test_without_a_constant_rate_the_first_schedule_sets_the_target() -> None:
    assert AccelAT(arms=product(["pgd"], ("linear", OURS))).base_schedule == "linear"
    assert AccelAT(arms=product(["pgd"], (OURS, "constant"))).base_schedule == "constant"


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


# CIFAR-10, and the YAML.


def test_epsilon_follows_the_data() -> None:
    claims = (Adversarial(), Adversarial(epsilon=0.2), Adversarial(data=Path("x")))
    assert [claim.radius for claim in claims] == [0.15, 0.2, 8 / 255]
    assert set(COLOURS) == set(SCHEDULES)


def test_cifar10_from_a_folder(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
        pixels = torch.randint(256, (20, 3072), generator=generator, dtype=torch.uint8)
        (folder / name).write_bytes(pickle.dumps({b"data": pixels.numpy(), b"labels": [*range(10)] * 2}))
    output = tmp_path / "out"
    claim = short(output, ["fgsm one-cycle"], data=tmp_path, epochs=1, width=1, limit=40)
    claim.check()
    write(claim, train_all(claim, 1))
    assert (output / "digits.png").read_bytes().startswith(PNG)
    assert not (output / "comparison.png").exists(), "one schedule is not compared"


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
