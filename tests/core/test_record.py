"""A record is bounded and even, resumes exactly, survives a kill, and is written by one function."""

import csv
import itertools
import multiprocessing
import os
import pickle
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_grad.callbacks import AccuracyGradientLR, DataPruning, GradientMonitor, NMSparsity, NormClipping
from lightning_grad.core import RunRecord
from lightning_grad.testing import assert_identical, fit
from lightning_grad.utilities import reporting
from tests.core.activation_norm import ActivationNorm

TECHNIQUES = {  # NMSparsity looks at metrics, so what AccuracyGradientLR logs comes first
    "accuracy_gradient_lr": lambda: AccuracyGradientLR(
        "val_loss", "min", window=1, cooldown=1, threshold=9.0, figure=False
    ),
    "nm_sparsity": lambda: NMSparsity(pattern="1:4", recipe="sdgf-stepwise", figure=False),
    "gradient_monitor": lambda: GradientMonitor(figure=False),
    "activation_norm": lambda: ActivationNorm("hidden", every_n_steps=2),
}


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def filled(count: int, most: int = 16, **arguments: Any) -> RunRecord:
    record = RunRecord(most, **arguments)
    for step in range(count):
        record.add({"step": step, "norm": float(step % 7)})
    return record


# Which rows are kept.


@pytest.mark.parametrize("count", [1, 2, 16, 17, 18, 31, 32, 33, 34, 100, 1000, 4097])
def test_rows_are_bounded_even_and_have_both_ends(count: int) -> None:
    steps = filled(count).series("step")[0]
    assert (steps[0], steps[-1]) == (0, count - 1)
    assert len(steps) == count if count <= 16 else 8 < len(steps) <= 17
    gaps = [later - earlier for earlier, later in itertools.pairwise(steps)]
    inner = gaps[1:-1]  # the first row stands for itself alone, the last one is where the run is
    assert len(set(inner)) <= 1
    assert not inner or max(gaps) == inner[0]


def test_the_row_that_weighs_most_stands_for_its_neighbors() -> None:
    record = RunRecord(16, weight=lambda row: row["norm"])
    for step in range(5000):
        record.add({"step": step, "norm": 100.0 if step in (777, 4321) else 1.0})
    assert [row["step"] for row in record.rows() if row["norm"] == 100.0] == [777, 4321]
    assert len(record.rows()) <= 17


def test_an_empty_record_has_neither_rows_nor_columns() -> None:
    record = RunRecord()
    assert (record.rows(), record.columns, record.series("step"), record.count) == ([], [], ([], []), 0)


def test_a_row_without_a_column_has_no_value_there() -> None:
    record = RunRecord()
    record.add({"step": 0, "a": 1.0, "mask": torch.ones(2)})
    record.add({"step": 5, "b": 2.0})
    assert record.rows() == [{"step": 0, "a": 1.0, "b": None}, {"step": 5, "a": None, "b": 2.0}]
    assert record.series("b") == ([5], [2.0])


def test_a_row_is_a_copy() -> None:
    record, row = RunRecord(), {"step": 0}
    record.add(row)
    row["step"] = 9
    record.rows()[0]["step"] = 9
    assert record.rows() == [{"step": 0}]


# The state.


@pytest.mark.parametrize("stop", [0, 1, 2, 16, 17, 18, 40, 99])
def test_a_resumed_record_is_that_of_an_uninterrupted_run(stop: int) -> None:
    resumed, whole = RunRecord(16), filled(100)
    state = pickle.loads(pickle.dumps(filled(stop).state_dict()))
    resumed.load_state_dict(state)
    for step in range(stop, 100):
        resumed.add({"step": step, "norm": float(step % 7)})
    assert_identical(resumed.state_dict(), whole.state_dict())
    assert resumed.rows() == whole.rows()


def test_a_state_is_not_the_live_record() -> None:
    record, other = filled(3), RunRecord()
    state = record.state_dict()
    other.load_state_dict(state)
    record.add({"step": 3})
    state["rows"][0]["norm"] = 9.0
    assert other.rows() == [{"step": step, "norm": float(step)} for step in range(3)]


# What is written while the run lasts.


class Owner:
    display_name = "Technique[a]"
    figure = True

    def log_key(self, quantity: str) -> str:
        return f"x/{quantity}"


@pytest.fixture
def trainer(tmp_path: Path) -> pl.Trainer:
    return pl.Trainer(logger=CSVLogger(tmp_path, "", ""), accelerator="cpu", enable_checkpointing=False)


def test_the_file_lacks_at_most_a_tenth_and_is_seldom_written(
    trainer: pl.Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, path, written = RunRecord(), tmp_path / "technique_a.csv", []
    monkeypatch.setattr(
        "lightning_grad.core.record.write_csv",
        lambda path, rows, write=reporting.write_csv: (written.append(len(rows)), write(path, rows)),
    )
    for step in range(1000):
        record.add({"step": step})
        record.save(trainer, Owner())
        last = int(path.read_text().splitlines()[-1])
        assert step - last <= 0.1 * (step + 1)
    assert len(written) < 100
    record.save(trainer, Owner(), now=True)
    assert [int(row["step"]) for row in rows_of(path)] == list(range(1000))
    assert [path.name for path in tmp_path.iterdir()] == ["technique_a.csv"]


def test_a_full_disk_does_not_end_the_training(trainer: pl.Trainer, tmp_path: Path) -> None:
    (tmp_path / "technique_a.csv.part").mkdir()
    with pytest.warns(
        UserWarning, match=r"Technique\[a\]: the table of the run could not be created: IsADirectoryError"
    ):
        filled(1).save(trainer, Owner())


def test_a_logger_without_a_folder_to_tell_does_not_end_the_training(trainer: pl.Trainer) -> None:
    """Callbacks save in on_exception too, where an error would keep others from saving."""

    class Lost(CSVLogger):
        @property
        def log_dir(self) -> str:
            raise OSError("the server is gone")

    trainer.loggers = [Lost("", "", "")]
    with pytest.warns(
        UserWarning, match=r"Technique\[a\]: the table of the run could not be created: OSError: the server"
    ):
        filled(1).save(trainer, Owner(), now=True)


def test_only_rank_zero_writes(trainer: pl.Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(trainer), "is_global_zero", False)
    record = filled(3)
    record.save(trainer, Owner(), now=True)
    record.report(trainer, Owner(), lambda: pytest.fail("drawn"), summary={"a": 1.0})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("wanted", "installed"), [(True, True), (True, False), (False, True)])
def test_everything_is_written_by_one_function(
    wanted: bool, installed: bool, trainer: pl.Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporting, "is_installed", lambda package: installed)
    record = filled(3)
    owner = Owner()
    owner.figure = wanted
    record.report(trainer, owner, lambda: record.draw("a title"), summary={"final": 2.0}, part="optimizer1")
    names = {"technique_a_optimizer1.csv", "metrics.csv"}
    names |= {"technique_a_optimizer1.png"} if wanted and installed else set()
    assert {path.name for path in tmp_path.iterdir()} == names
    assert rows_of(tmp_path / "metrics.csv") == [{"step": "0", "x/optimizer1/final": "2.0"}]
    assert [row["norm"] for row in rows_of(tmp_path / "technique_a_optimizer1.csv")] == ["0.0", "1.0", "2.0"]


def test_records_of_all_kinds_are_drawn(tmp_path: Path) -> None:
    record = RunRecord()
    record.draw("none yet").savefig(tmp_path / "empty.png")
    for step in range(9):
        values = {"$odd_name": float("nan") if step == 3 else 1.0, "wide/range": 10.0**step, "zero": 0.0}
        record.add({"epoch": 0, "step": step, **values, "infinite": float("inf"), "word": "a", "flag": True})
    axes = record.draw("A title with $x").axes
    assert [axis.get_yscale() for axis in axes] == ["linear", "log", "linear", "linear"]
    assert axes[-1].get_xlabel() == "step"
    for name in range(20):
        record.add({"epoch": 1, "step": 10, f"n{name}": 1.0})
    figure = record.draw("Probe")
    assert figure.get_suptitle() == "Probe (first 8 of 24 values)"
    figure.savefig(tmp_path / "many.png")


# A run that is killed.


class Kill(pl.Callback):
    """Kills the process in a step as the system does: nothing is cleaned up."""

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 14:
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder: Path, *others: Any, ckpt: Any = None) -> list[Any]:
    callbacks = [make() for make in TECHNIQUES.values()]
    keeper = ModelCheckpoint(folder / "checkpoints", filename="{step}", save_top_k=-1)
    logger = CSVLogger(folder, name="", version="")
    arguments = {"max_epochs": 3, "log_every_n_steps": 2, "enable_checkpointing": True, "ckpt": ckpt}
    fit([NormClipping(0.5), *callbacks, keeper, *others], logger=logger, **arguments)
    return callbacks


@pytest.mark.filterwarnings("ignore:.*is not empty", "ignore:.*use of fork:DeprecationWarning")
def test_a_run_that_is_killed_keeps_its_rows_and_resumes_the_same_files(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole")
    child = multiprocessing.get_context("fork").Process(target=train, args=(tmp_path / "killed", Kill()))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL

    left = {stem: rows_of(tmp_path / "killed" / f"{stem}.csv") for stem in TECHNIQUES}
    assert [int(row["step"]) for row in left["nm_sparsity"]] == [1, 3, 5, 7, 9, 11, 13]
    assert [int(row["step"]) for row in left["gradient_monitor"]] == list(range(14))
    assert [int(row["step"]) for row in left["accuracy_gradient_lr"]] == [5, 11]
    assert [int(row["step"]) for row in left["activation_norm"]] == [1, 3, 5, 7, 9, 11, 13]

    resumed = train(tmp_path / "killed", ckpt=tmp_path / "killed" / "checkpoints" / "step=12.ckpt")
    for stem in TECHNIQUES:
        written = (tmp_path / name / f"{stem}.csv" for name in ("whole", "killed"))
        assert len({path.read_text() for path in written}) == 1, stem
    for one, other in zip(whole, resumed, strict=True):
        assert_identical(one.state_dict(), other.state_dict())


def test_what_is_missing_without_matplotlib_is_said_once_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(reporting, "is_installed", lambda package: package != "matplotlib")
    monkeypatch.setattr(reporting, "rank_zero_info", said.append)
    foreign = pl.Callback()
    foreign.figure = object()  # of another kind
    ours = [NormClipping(0.5), GradientMonitor(figure=False), DataPruning(epoch=1), GradientMonitor(name="b")]
    callbacks = [foreign, *ours]
    fit(callbacks, logger=CSVLogger(tmp_path, "", ""), max_epochs=2)
    assert said == [
        "Figures need matplotlib, which is not installed. Without figures: DataPruning, GradientMonitor[b]. "
        "Run: pip install 'lightning-grad[plot]'."
    ]
    written = {path.name for path in tmp_path.iterdir()}
    assert {"data_pruning_epoch1_samples.csv", "gradient_monitor.csv", "gradient_monitor_b.csv"} <= written
    assert not list(tmp_path.glob("*.png"))
