"""Facts reach every logger in the way that it can take them, and the disk as well."""

import csv
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from torch import Tensor

from lightning_grad.callbacks import GradientMonitor
from lightning_grad.utilities import reporting
from lightning_grad.utilities.reporting import (
    format_table,
    is_log_step,
    limit_layers,
    log_figure,
    log_file,
    log_histograms,
    log_picture,
    log_settings,
    log_summary,
    log_table,
    logged_at,
    output_file,
    output_folder,
    say_if_no_figures,
    stepped_batches,
    write_csv,
)


def trainer_with(*loggers: Any, **arguments: Any) -> pl.Trainer:
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(logger=list(loggers) or False, enable_checkpointing=False, **quiet, **arguments)


@pytest.fixture
def wandb_logger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbLogger]:
    """A logger with a run that keeps config and summary, and starts no process."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    import wandb

    yield WandbLogger(project="project", save_dir=tmp_path, version="v1", mode="disabled")
    wandb.finish()


@pytest.fixture
def tensorboard(tmp_path: Path) -> TensorBoardLogger:
    return TensorBoardLogger(tmp_path, name="board", version=2)


@pytest.fixture
def csv_logger(tmp_path: Path) -> CSVLogger:
    return CSVLogger(tmp_path, name="table", version=3)


def events_of(logger: TensorBoardLogger) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    return events


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def figure() -> Any:
    from matplotlib.figure import Figure

    drawn = Figure()
    drawn.subplots().plot([1, 2])
    return drawn


class Recorder:
    """A logger with every method that W&B's has; it writes down how each is called."""

    def __init__(self) -> None:
        self.calls: dict[str, dict[str, Any]] = {}
        self.experiment = SimpleNamespace(
            summary={}, log_artifact=lambda *a, **k: self.calls.update(artifact={"args": a, **k}), use_artifact=None
        )

    def log_hyperparams(self, params: Any) -> None:
        self.calls["hyperparams"] = params

    def log_metrics(self, metrics: Any, step: int) -> None:
        self.calls["metrics"] = {"metrics": metrics, "step": step}

    def log_image(self, **kwargs: Any) -> None:
        self.calls["image"] = kwargs

    def log_table(self, **kwargs: Any) -> None:
        self.calls["table"] = kwargs


def recording_trainer(rank_zero: bool = True, steps: int = 7) -> SimpleNamespace:
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=steps))
    return SimpleNamespace(loggers=[Recorder()], is_global_zero=rank_zero, fit_loop=loop)


# Where and when.


def test_output_folder_is_that_of_the_first_logger_with_one(
    tmp_path: Path, csv_logger: CSVLogger, tensorboard: TensorBoardLogger, wandb_logger: WandbLogger
) -> None:
    assert output_folder(trainer_with(csv_logger)) == tmp_path / "table" / "version_3"
    assert output_folder(trainer_with(tensorboard)) == tmp_path / "board" / "version_2"
    assert output_folder(trainer_with(wandb_logger)) == tmp_path / "project" / "v1"
    assert output_folder(trainer_with(tensorboard, csv_logger)) == tmp_path / "board" / "version_2"
    assert output_folder(trainer_with(Folderless(), csv_logger)) == tmp_path / "table" / "version_3"


class Folderless(pl.loggers.logger.DummyLogger):
    """Writes nowhere."""


def test_no_logger_and_a_dry_run_have_no_output_folder() -> None:
    assert output_folder(trainer_with()) is None
    assert output_folder(trainer_with(Folderless())) is None
    assert output_folder(pl.Trainer(accelerator="cpu", fast_dev_run=True, enable_progress_bar=False)) is None


def test_offline_wandb_has_a_folder_before_its_run_has_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = WandbLogger(project="project", save_dir=tmp_path, version="v7", offline=True)
    assert output_folder(trainer_with(logger)) == tmp_path / "project" / "v7"
    assert logger._experiment is None
    assert os.environ["WANDB_MODE"] == "offline"


@pytest.mark.parametrize(("every", "expected"), [(1, [0, 1, 2, 3, 4, 5]), (3, [2, 5]), (0, [])])
def test_log_steps_are_those_at_which_lightning_logs(every: int, expected: list[int]) -> None:
    trainer = recording_trainer()
    trainer.log_every_n_steps, trainer.fast_dev_run = every, False
    found, a_step_before = [], []
    for steps in range(6):
        trainer.fit_loop.epoch_loop._batches_that_stepped = steps
        assert stepped_batches(trainer) == steps
        found += [steps] * is_log_step(trainer)
        a_step_before += [steps + 1] * is_log_step(trainer, ahead=1)
    assert found == expected
    assert a_step_before == [step for step in [*expected, 6 if every == 1 else -1] if step > 0]


def test_log_step_agrees_with_what_a_trainer_writes(tmp_path: Path) -> None:
    class Net(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)
            self.automatic_optimization = False
            self.asked: list[float] = []

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                optimizer.step()
            if is_log_step(self.trainer):
                self.asked.append(float(batch_idx))
            self.log("batch", float(batch_idx))

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD([parameter], 0.1) for parameter in self.parameters()]

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(torch.ones(8, 1))

    module, logger = Net(), CSVLogger(tmp_path)
    trainer_with(logger, max_epochs=1, log_every_n_steps=3).fit(module)
    rows = rows_of(Path(logger.log_dir, "metrics.csv"))
    assert module.asked == [float(row["batch"]) for row in rows] == [2.0, 5.0]


def test_every_step_of_a_dry_run_is_a_log_step() -> None:
    trainer = recording_trainer()
    trainer.log_every_n_steps, trainer.fast_dev_run = 50, True
    assert is_log_step(trainer)


# Settings and summaries.


def test_settings_reach_every_kind_of_logger(
    csv_logger: CSVLogger, tensorboard: TensorBoardLogger, wandb_logger: WandbLogger
) -> None:
    settings = {"pattern": "2:4", "include": None, "patterns": {"*": "1:8"}}
    log_settings(trainer_with(csv_logger, tensorboard, wandb_logger), "NMSparsity[a]", settings)
    assert csv_logger.experiment.hparams["NMSparsity[a]"] == settings
    assert tensorboard.hparams["NMSparsity[a]"] == settings
    assert dict(wandb_logger.experiment.config)["NMSparsity[a]"] == settings


def test_summary_goes_to_the_runs_summary_where_there_is_one(wandb_logger: WandbLogger) -> None:
    log_summary(trainer_with(wandb_logger), {"sparsity/final_density": 0.25})
    assert dict(wandb_logger.experiment.summary) == {"sparsity/final_density": 0.25}


def test_summary_falls_back_to_last_scalars(csv_logger: CSVLogger, tensorboard: TensorBoardLogger) -> None:
    log_summary(trainer_with(csv_logger, tensorboard), {"final_density": 0.25, "final_exact": 1.0})
    rows = rows_of(Path(csv_logger.log_dir, "metrics.csv"))
    assert rows == [{"final_density": "0.25", "final_exact": "1.0", "step": "0"}]
    assert [event.value for event in events_of(tensorboard).Scalars("final_density")] == [0.25]


# Figures, tables, histograms, files.


def test_figure_is_saved_as_png_without_any_logger(tmp_path: Path) -> None:
    path = tmp_path / "new" / "figure.png"
    log_figure(trainer_with(), "sparsity/figure", figure, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_figure_reaches_the_loggers_that_show_images(
    tmp_path: Path, csv_logger: CSVLogger, tensorboard: TensorBoardLogger
) -> None:
    path = tmp_path / "figure.png"
    log_figure(trainer_with(csv_logger, tensorboard), "sparsity/figure", figure(), path)
    assert events_of(tensorboard).Tags()["images"] == ["sparsity/figure"]
    trainer = recording_trainer()
    log_figure(trainer, "sparsity/figure", figure(), path)
    assert trainer.loggers[0].calls == {"image": {"key": "sparsity/figure", "images": [str(path)], "step": 7}}


ROWS = [{"step": 1, "decay": 0.5, "flips": None}, {"step": 2, "decay": 0.25, "flips": 0.125}]


def test_table_is_written_as_csv_without_any_logger(tmp_path: Path) -> None:
    path = tmp_path / "new" / "table.csv"
    log_table(trainer_with(), "sparsity/record", ROWS, path)
    written = rows_of(path)
    assert written == [{"step": "1", "decay": "0.5", "flips": ""}, {"step": "2", "decay": "0.25", "flips": "0.125"}]


def test_table_reaches_the_loggers_that_show_tables(tmp_path: Path, csv_logger: CSVLogger) -> None:
    trainer = recording_trainer()
    trainer.loggers.append(csv_logger)
    log_table(trainer, "sparsity/record", ROWS, tmp_path / "table.csv")
    expected = {"key": "sparsity/record", "columns": ["step", "decay", "flips"], "step": 7}
    assert trainer.loggers[0].calls == {"table": {**expected, "data": [[1, 0.5, None], [2, 0.25, 0.125]]}}


PICTURES = [np.arange(48, dtype=np.uint8).reshape(4, 4, 3), None]


def test_table_shows_pictures_where_they_can_be_shown(tmp_path: Path, csv_logger: CSVLogger) -> None:
    trainer = recording_trainer()
    trainer.loggers.append(csv_logger)
    log_table(trainer, "data/samples", ROWS, tmp_path / "table.csv", PICTURES)
    sent = trainer.loggers[0].calls["table"]
    assert sent["columns"] == ["picture", "step", "decay", "flips"]
    assert [line[1:] for line in sent["data"]] == [[1, 0.5, None], [2, 0.25, 0.125]]
    assert (np.asarray(sent["data"][0][0].image) == PICTURES[0]).all()
    assert sent["data"][1][0] is None
    assert list(rows_of(tmp_path / "table.csv")[0]) == ["step", "decay", "flips"]


@pytest.mark.parametrize("case", ["no picture", "no Pillow", "not W&B"])
def test_table_without_pictures_has_no_column_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    trainer = recording_trainer()
    if case == "no Pillow":
        monkeypatch.setattr(reporting, "is_installed", lambda package: package != "PIL")
    if case == "not W&B":
        del trainer.loggers[0].experiment.log_artifact
    pictures = [None, None] if case == "no picture" else PICTURES
    log_table(trainer, "data/samples", ROWS, tmp_path / "table.csv", pictures)
    assert trainer.loggers[0].calls["table"]["columns"] == ["step", "decay", "flips"]


def test_table_holds_texts_of_any_kind(tmp_path: Path, tensorboard: TensorBoardLogger) -> None:
    texts = ["a | b\nc", "Gr\u00fc\u00dfe \u732b"]
    log_table(trainer_with(tensorboard), "data/samples", [{"text": text} for text in texts], tmp_path / "table.csv")
    with (tmp_path / "table.csv").open(newline="", encoding="utf-8") as file:
        assert [row["text"] for row in csv.DictReader(file)] == texts
    (shown,) = events_of(tensorboard).Tensors("data/samples/text_summary")
    lines = shown.tensor_proto.string_val[0].decode().splitlines()
    assert lines == ["| text |", "| --- |", "| a \\| b c |", "| Gr\u00fc\u00dfe \u732b |"]


def test_table_without_rows_is_not_written(tmp_path: Path) -> None:
    log_table(trainer_with(), "sparsity/record", [], tmp_path / "table.csv")
    assert not (tmp_path / "table.csv").exists()


WEIGHTS = {"good": torch.randn(4, 4).bfloat16().requires_grad_(), "part": torch.tensor([1.0, float("nan"), 3.0])}
HOPELESS = {"none": torch.full((3,), float("nan")), "empty": torch.empty(0)}


def test_histograms_show_the_finite_values_on_tensorboard(
    tensorboard: TensorBoardLogger, csv_logger: CSVLogger
) -> None:
    log_histograms(trainer_with(csv_logger, tensorboard), {**WEIGHTS, **HOPELESS})
    events = events_of(tensorboard)
    assert sorted(events.Tags()["histograms"]) == ["good", "part"]
    assert events.Histograms("good")[0].histogram_value.num == 16
    assert events.Histograms("part")[0].histogram_value.sum == 4


def test_histograms_show_the_finite_values_on_wandb(wandb_logger: WandbLogger) -> None:
    log_histograms(trainer_with(wandb_logger), {**WEIGHTS, **HOPELESS})
    shown = dict(wandb_logger.experiment.summary)
    assert sum(shown["good"].histogram) == 16
    assert sum(shown["part"].histogram) == 2
    assert not {"none", "empty"} & shown.keys()


def test_dry_run_needs_no_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    trainer = pl.Trainer(accelerator="cpu", fast_dev_run=True, enable_progress_bar=False)
    assert type(trainer.loggers[0]).__name__ == "DummyLogger"
    log_histograms(trainer, WEIGHTS)


def test_dry_run_takes_every_kind_of_fact(tmp_path: Path) -> None:
    trainer = pl.Trainer(accelerator="cpu", fast_dev_run=True, enable_progress_bar=False)
    log_settings(trainer, "NMSparsity", {"a": 1})
    log_summary(trainer, {"a": 1.0})
    log_figure(trainer, "figure", figure(), tmp_path / "figure.png")
    log_picture(trainer, "picture", PIXELS, tmp_path / "picture.png")
    log_table(trainer, "table", ROWS, tmp_path / "table.csv")
    log_file(trainer, tmp_path / "table.csv", "table", "masks")
    assert (tmp_path / "figure.png").exists()


def test_file_becomes_an_artifact_where_there_are_some(tmp_path: Path, tensorboard: TensorBoardLogger) -> None:
    trainer = recording_trainer()
    trainer.loggers.append(tensorboard)
    log_file(trainer, tmp_path / "masks.pt", name=f"masks of [1]{'x' * 200}", kind="mask", aliases=["epoch 1"])
    expected = (str(tmp_path / "masks.pt"), f"masks_of_1_{'x' * 117}", "mask", ["latest", "epoch_1"])
    assert trainer.loggers[0].calls == {"artifact": {"args": expected}}


PIXELS = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)


def test_a_picture_is_saved_and_sent_at_the_step_that_is_asked_for(tmp_path: Path) -> None:
    from PIL import Image

    trainer = recording_trainer(steps=7)
    with logged_at(trainer, 3):
        log_picture(trainer, "picture", PIXELS, tmp_path / "new" / "picture.png", "a caption")
    path = tmp_path / "new" / "picture.png"
    assert trainer.loggers[0].calls["image"] == {
        "key": "picture",
        "images": [str(path)],
        "step": 3,
        "caption": ["a caption"],
    }
    assert stepped_batches(trainer) == 7
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image), PIXELS)


def test_the_step_is_put_back_after_an_error() -> None:
    trainer = recording_trainer(steps=7)
    with pytest.raises(KeyError), logged_at(trainer, 3):
        raise KeyError
    assert stepped_batches(trainer) == 7


def test_a_figure_is_drawn_only_where_matplotlib_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporting, "is_installed", lambda package: False)
    trainer = recording_trainer()
    log_figure(trainer, "figure", lambda: pytest.fail("drawn"), tmp_path / "figure.png")
    log_picture(trainer, "picture", PIXELS, tmp_path / "picture.png")
    assert trainer.loggers[0].calls == {}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("display_name", "stem"),
    [
        ("NMSparsity", "nm_sparsity"),
        ("AccuracyGradientLR", "accuracy_gradient_lr"),
        ("DGCStrategy", "dgc_strategy"),
        ("GradientMonitor[late one/2]", "gradient_monitor_late_one_2"),
        ("ZClip[a.b-c_d]", "z_clip_a.b-c_d"),
    ],
)
def test_files_are_named_by_one_rule(display_name: str, stem: str, csv_logger: CSVLogger) -> None:
    path = output_file(trainer_with(csv_logger), display_name, "_epoch3.csv")
    assert path == Path(csv_logger.log_dir, f"{stem}_epoch3.csv")
    assert output_file(trainer_with(), display_name, ".csv") is None


def test_a_table_that_cannot_be_finished_leaves_the_old_one(tmp_path: Path) -> None:
    class Unprintable:
        def __str__(self) -> str:
            raise MemoryError

    write_csv(tmp_path / "a.b", ROWS)
    with pytest.raises(MemoryError):
        write_csv(tmp_path / "a.b", [*ROWS, {"step": 3, "decay": Unprintable(), "flips": None}])
    assert len(rows_of(tmp_path / "a.b")) == 2


def test_only_rank_zero_writes(tmp_path: Path) -> None:
    trainer = recording_trainer(rank_zero=False)
    log_settings(trainer, "NMSparsity", {"a": 1})
    log_summary(trainer, {"a": 1.0})
    log_figure(trainer, "figure", figure(), tmp_path / "figure.png")
    log_picture(trainer, "picture", PIXELS, tmp_path / "picture.png")
    log_table(trainer, "table", ROWS, tmp_path / "table.csv")
    log_histograms(trainer, WEIGHTS)
    log_file(trainer, tmp_path / "file", "file", "masks")
    assert trainer.loggers[0].calls == {}
    assert trainer.loggers[0].experiment.summary == {}
    assert list(tmp_path.iterdir()) == []


# Names and columns.


@pytest.mark.parametrize(
    ("layer_depth", "max_layers", "expected"),
    [
        (None, 8, {"a.0.x": 1.0, "a.0.y": 3.0, "a.1.x": 8.0, "b": 5.0}),
        (None, 2, {"a.0.x": 1.0, "a.0.y": 3.0}),
        (2, 8, {"a.0": 2.0, "a.1": 8.0, "b": 5.0}),
        (1, 8, {"a": 4.0, "b": 5.0}),
        (1, 1, {"a": 4.0}),
        (9, 9, {"a.0.x": 1.0, "a.0.y": 3.0, "a.1.x": 8.0, "b": 5.0}),
        (None, 0, {}),
    ],
)
def test_layers_are_joined_by_their_mean_and_cut_in_order(
    layer_depth: int | None, max_layers: int, expected: dict[str, float]
) -> None:
    values = {"a.0.x": 1.0, "a.0.y": 3.0, "a.1.x": 8.0, "b": 5.0}
    found = limit_layers(values, layer_depth, max_layers)
    assert found == expected
    assert list(found) == list(expected)


def test_table_columns_are_aligned() -> None:
    shown = format_table([["encoder.0", 1, None], ["b", 123456, "long reason"]], ["weight", "n", "why"])
    assert shown.splitlines() == [
        "weight     n       why",
        "encoder.0  1       None",
        "b          123456  long reason",
    ]


def test_table_of_no_rows_is_its_header() -> None:
    assert format_table([], ["a", "b"]) == "a  b"


def test_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        format_table([["a", "b", "c"]], ["one", "two"])


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("logs", [True, False])
@pytest.mark.parametrize("installed", [True, False])
def test_a_figure_that_will_be_missing_is_told(
    wanted: bool, logs: bool, installed: bool, csv_logger: CSVLogger, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(reporting, "rank_zero_info", said.append)
    monkeypatch.setattr(reporting, "is_installed", lambda package: installed)
    callbacks = [GradientMonitor(figure=wanted), GradientMonitor(figure=wanted, name="b")]
    trainer = trainer_with(*([csv_logger] if logs else []), callbacks=callbacks)
    for callback in callbacks:
        say_if_no_figures(trainer, callback)
    is_missed = wanted and logs and not installed
    expected = (
        "Figures need matplotlib, which is not installed. Without figures: GradientMonitor, GradientMonitor[b]. "
        "Run: pip install 'lightning-grad[plot]'."
    )
    assert said == ([expected] if is_missed else [])
