"""The study of compressed gradients and its YAML: bytes are counted as defined, and everything that is promised is written."""

import csv
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import plain_project
import pytest
import torch

from lightning_grad.strategies import DGCStrategy
from studies.claims.communication import STRATEGIES, Communication, OneBit, Recorder, Result
from studies.common import Follow, Ticker, read_curve
from studies.figures import communication
from studies.figures.communication import print_table
from studies.report import write
from studies.runner import train_all

EXAMPLES = Path(plain_project.__file__).parents[1]
PNG = b"\x89PNG\r\n\x1a\n"

# What Lightning and torch say about themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*use of fork\\(\\) may lead to deadlocks:DeprecationWarning"),
]

STEPS = 22  # of an epoch: 1400 digits in batches of 64 over all ranks
BIASES, LAYERS = 522, (64 * 256, 256 * 256, 256 * 10)
ENTRIES = BIASES + sum(LAYERS)


# The study.


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Communication, list[Result]]:
    """Train in each way for two epochs, on two ranks."""
    ways = ["dense", "fp16", "powersgd-4", "dgc-99.9"]
    folder, rates = tmp_path_factory.mktemp("study"), (0.05,)
    study = Communication(arms=ways, epochs=2, seeds=1, rates=rates, output=folder, start_method="fork")
    results = train_all(study, 1)
    write(study, results)
    return study, results


def test_every_way_has_a_result_and_learns(study: tuple[Communication, list[Result]]) -> None:
    asked, results = study
    assert [result.arm for result in results] == list(asked.arms)
    for result in results:
        assert 0.6 < result.test_accuracy <= 1
        accuracies = read_curve(asked.folder(result) / "metrics.csv", "val_acc")
        assert accuracies[2 * STEPS] == pytest.approx(result.validation_accuracy)


def test_bytes_are_those_of_the_messages(study: tuple[Communication, list[Result]]) -> None:
    _, (dense, half, low_rank, sparse) = study
    assert dense.step_kilobytes == 4 * ENTRIES / 1e3
    assert half.step_kilobytes == 2 * ENTRIES / 1e3
    factors = 4 * (64 + 256) + 4 * (256 + 256) + 4 * (256 + 10)
    guard = 1  # the number that says whether gradients are finite
    assert low_rank.step_kilobytes == 4 * (factors + BIASES + guard) / 1e3
    pairs = [sum(int(share * entries) for entries in LAYERS) for share in (1 / 4, 1 / 16)]  # the warm-up of two epochs
    sent = [8 * count + 4 * (BIASES + guard) for count in pairs]
    assert sparse.step_kilobytes == sent[1] / 1e3
    assert sparse.megabytes == pytest.approx(STEPS * sum(sent) / 1e6)


def test_ratio_is_of_the_whole_training(study: tuple[Communication, list[Result]]) -> None:
    _, results = study
    for result in results:
        assert result.ratio * result.megabytes == pytest.approx(2 * STEPS * 4 * ENTRIES / 1e6)
    assert [result.ratio for result in results[:2]] == [1, 2]


def test_only_compressed_gradients_leave_something_unsent(study: tuple[Communication, list[Result]]) -> None:
    assert [result.residual > 0 for result in study[1]] == [False, False, True, True]


def test_half_precision_rounds_and_does_no_more(study: tuple[Communication, list[Result]]) -> None:
    asked, results = study
    dense, half = (read_curve(asked.folder(result) / "metrics.csv", "val_loss") for result in results[:2])
    assert half != dense
    assert list(half.values()) == pytest.approx(list(dense.values()), abs=0.02)


def test_figure_and_numbers_are_written(study: tuple[Communication, list[Result]]) -> None:
    asked, results = study
    for image in ("comparison.png", "dgc-99.9_0.05_seed0/dgc_strategy.png"):
        assert (asked.output / image).read_bytes().startswith(PNG)
    with (asked.output / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["arm"] for row in rows] == list(asked.arms)
    assert [float(row["megabytes"]) for row in rows] == [result.megabytes for result in results]


def test_figure_shows_what_was_written(study: tuple[Communication, list[Result]]) -> None:
    asked, results = study
    by_epoch, by_bytes, at_end = communication.draw_comparison(asked, results).axes
    assert [len(axis.lines) for axis in (by_epoch, by_bytes)] == [4, 8]  # with a mark at the end of each
    ends = [line.get_xdata()[-1] for line in by_bytes.lines[1::2]]
    assert ends == pytest.approx([result.megabytes for result in results])
    dots = [line.get_xdata()[0] for line in at_end.lines[1::2]]
    assert dots == pytest.approx([100 * result.test_accuracy for result in results])
    names = [text.get_text().splitlines()[0] for text in at_end.get_yticklabels()]
    assert names == list(asked.arms)
    assert [
        f"{result.ratio:,.0f} x less" in text.get_text()
        for text, result in zip(at_end.get_yticklabels(), results, strict=True)
    ] == [False, True, True, True]


def test_the_same_seed_gives_the_same_numbers(study: tuple[Communication, list[Result]], tmp_path: Path) -> None:
    asked, results = study
    assert train_all(replace(asked, arms=["dgc-99.9"], output=tmp_path), 1) == results[-1:]


def test_one_bit_adam_sends_less_after_its_freeze_and_ends_with_a_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = OneBit(epochs=2, seeds=1, rates=(1e-3,), freeze_step=5, output=tmp_path, start_method="fork")
    dense, signs = train_all(asked, 1)
    print_table(asked, [dense, signs])
    assert dense.step_kilobytes == 4 * ENTRIES / 1e3
    assert signs.step_kilobytes == (sum(LAYERS) / 8 + 2 * 4 * len(LAYERS) + 4 * (BIASES + 1)) / 1e3
    assert signs.residual > 0
    assert asked.difference({"dense": dense, "one-bit": signs}, "one-bit", "dense") > -0.1
    assert f"validation loss of one-bit: {signs.validation_loss:.4f}" in capsys.readouterr().out


# Ways to send gradients, and ranks.


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.parametrize("way", list(STRATEGIES))
def test_each_way_can_be_given_to_a_rank(way: str, start: str) -> None:
    strategy = pickle.loads(pickle.dumps(STRATEGIES[way](start)))
    assert strategy._start_method == start
    assert any(communication.names(word, way) for word in communication.MEANINGS)


def test_what_follows_a_training_can_be_given_to_a_rank(tmp_path: Path) -> None:
    ticker = Ticker("dense seed 0", "1 of 2")
    recorder, follow = pickle.loads(pickle.dumps([Recorder(tmp_path), Follow(ticker)]))
    assert recorder.folder == tmp_path
    assert follow.show == ticker


def test_ranks_are_forked_where_that_is_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert Communication().start == "fork"
    assert Communication(start_method="spawn").start == "spawn"
    for platform in ("darwin", "win32"):
        monkeypatch.setattr(sys, "platform", platform)
        assert Communication().start == "spawn"
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Communication().start == "spawn"


# The table and the YAML.


def test_table_tells_what_its_columns_mean(capsys: pytest.CaptureFixture[str]) -> None:
    results = [Result("dense", seed, None, 0.9, 0.98, 340.0, 200.0, 1.0, 0.0) for seed in (0, 1)]
    results += [
        Result("dgc-99-unmasked", seed, None, 0.9, 0.96 + 0.02 * seed, 8.9, 10.0, 20.0, 3.0 + seed) for seed in (0, 1)
    ]
    print_table(Communication(arms=["dense", "dgc-99-unmasked"], seeds=2), results)
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines()]
    assert ["dense", "98.0", "±", "0.0", "%", "340.0", "200.0", "1", "x", "-"] in rows
    assert ["dgc-99-unmasked", "97.0", "±", "1.4", "%", "8.9", "10.0", "20", "x", "3.50"] in rows
    assert "unmasked: " in printed
    assert "the largest 1 %" in printed
    assert "PowerSGD" not in printed
    assert max(map(len, printed.splitlines())) <= 80


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # LightningCLI's use of jsonargparse
def test_yaml_runs_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jsonargparse")
    from train import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    short = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=4", "--trainer.log_every_n_steps=1"]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    forked = "--trainer.strategy.init_args.start_method=fork"  # by default the whole command is run for each rank
    cli = main(["fit", "--config", str(EXAMPLES / "communication.yaml"), forked, *short, *quiet])
    strategy = cli.trainer.strategy
    assert isinstance(strategy, DGCStrategy)
    assert (strategy.ratio, cli.trainer.num_devices) == (0.01, 2)
    assert cli.trainer.callback_metrics["comm/ratio"] > 1
    (figure,) = tmp_path.glob("runs/communication_yaml/version_0/dgc_strategy.png")
    assert figure.read_bytes().startswith(PNG)
