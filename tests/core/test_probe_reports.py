"""What a probe finds reaches every logger and the disk, and its record is kept, thinned and drawn."""

import csv
import dataclasses
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from lightning_grad.core import Picture, ProbeLook, Reading, RunRecord, Table
from lightning_grad.testing import fit
from lightning_grad.utilities import reporting
from tests.core.activation_norm import ActivationNorm
from tests.core.probed import Answers, make_noisy, noisy_loaders
from tests.core.test_probe import run
from tests.wandb_offline import read_history


class Shows(ActivationNorm):
    """Returns something of every kind."""

    def probe(self, look: ProbeLook) -> Reading:
        from matplotlib.figure import Figure

        found = super().probe(look)
        gray = np.full((6, 8), look.step, np.uint8)
        figure = Figure(figsize=(2, 1))
        figure.subplots().plot([0, 1])
        pictures = {
            "gray": Picture(gray, f"step {look.step}"),
            "color": Picture(np.stack([gray] * 3, -1)),
            "drawn": figure,
            "late": lambda: figure,
        }
        half = found.arrays["norms"].bfloat16()
        arrays = {"norms": found.arrays["norms"], "half": half}
        tables = {"rows": Table([{"index": index} for index in look.indices], [gray] * len(look.indices))}
        return Reading(found.scalars, arrays, pictures, tables, {"norms": found.arrays["norms"]})


def test_every_logger_gets_what_it_can_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    import wandb

    wandb.teardown()  # of another test's run, whose settings would stay
    table, board = CSVLogger(tmp_path / "csv", name="", version=""), TensorBoardLogger(tmp_path / "board")
    cloud = WandbLogger(project="project", save_dir=tmp_path, offline=True)
    probe = Shows("hidden")
    fit([probe], logger=[table, board, cloud], max_epochs=2)
    wandb.finish()
    expected = [row["norm"] for row in probe.record.rows()]

    rows = list(csv.DictReader((tmp_path / "csv" / "metrics.csv").read_text().splitlines()))
    assert [float(row["activations/norm"]) for row in rows if row["activations/norm"]] == pytest.approx(expected)
    assert not [key for key in rows[0] if key.startswith("activations/") and key != "activations/norm"]

    history = read_history(tmp_path)
    logged = [(row["trainer/global_step"], row["activations/norm"]) for row in history if "activations/norm" in row]
    assert logged == [(5, pytest.approx(expected[0])), (11, pytest.approx(expected[1]))]
    kinds = {key.removesuffix("/_type"): row[key] for row in history for key in row if key.endswith("/_type")}
    assert kinds["activations/norms"] == kinds["activations/half"] == "histogram"
    assert {kinds[f"activations/{name}"] for name in ("gray", "color", "drawn", "late", "figure")} == {
        "images/separated"
    }
    assert kinds["activations/looks"] == kinds["activations/rows"] == "table-file"

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(board.log_dir)
    events.Reload()
    tags = events.Tags()
    assert {f"activations/{name}" for name in ("gray", "color", "drawn", "late", "figure")} <= set(tags["images"])
    assert {"activations/norms", "activations/half"} <= set(tags["histograms"])
    assert [event.step for event in events.Images("activations/gray")] == [5, 11]
    assert [event.step for event in events.Scalars("activations/norm")] == [5, 11]
    assert any("activations/looks" in tag for tag in tags["tensors"])


def test_files_of_each_look_and_of_the_whole_run_are_in_the_folder_of_the_logs(tmp_path: Path) -> None:
    probe = Shows("hidden", name="h")
    fit([probe], logger=CSVLogger(tmp_path, name="", version=""), max_epochs=2)
    assert [(row["step"], row["norms"].shape) for row in probe.kept_looks.kept] == [(5, (8,)), (11, (8,))]
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("shows_h*") if path.is_file()}
    assert names == {"shows_h.csv", "shows_h.png"}
    looks = {path.name for path in (tmp_path / "shows_h").iterdir()}
    endings = (".npz", "_gray.png", "_color.png", "_drawn.png", "_late.png", "_rows.csv")
    assert looks == {f"step_{step:08d}{ending}" for step in (5, 11) for ending in endings}
    with np.load(tmp_path / "shows_h" / "step_00000005.npz", allow_pickle=False) as arrays:
        assert arrays["norms"].shape == (8,)
        assert arrays["half"].dtype == np.float32
    rows = list(csv.DictReader((tmp_path / "shows_h.csv").read_text().splitlines()))
    assert [row["step"] for row in rows] == ["5", "11"]
    from PIL import Image

    with Image.open(tmp_path / "shows_h" / "step_00000011_gray.png") as image:
        assert np.array_equal(np.asarray(image), np.full((6, 8), 11))


def test_without_a_logger_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer, _ = fit([Shows("hidden")], max_epochs=1)
    assert not list(tmp_path.iterdir())
    assert "activations/norm" in trainer.callback_metrics


def test_without_matplotlib_and_pillow_all_but_figures_and_pictures_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(reporting, "is_installed", lambda package: False)
    monkeypatch.setattr(reporting, "rank_zero_info", said.append)
    fit([Shows("hidden")], logger=CSVLogger(tmp_path, name="", version=""), max_epochs=1)
    assert len([text for text in said if "Without figures: Shows." in text]) == 1
    assert (tmp_path / "shows.csv").is_file()
    assert {path.name for path in (tmp_path / "shows").iterdir()} == {"step_00000005.npz", "step_00000005_rows.csv"}
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_a_barebones_trainer_and_a_dry_run_only_look() -> None:
    for arguments in ({"barebones": True}, {"fast_dev_run": True}):
        probe = Answers(4)
        trainer = pl.Trainer(accelerator="cpu", max_epochs=1, callbacks=[probe], **arguments)  # type: ignore[arg-type]
        trainer.fit(make_noisy(), *noisy_loaders())
        assert len(probe.record.rows()) == 1


def test_a_run_that_breaks_off_leaves_its_record(tmp_path: Path) -> None:
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 9:
                raise RuntimeError("stopped on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        run(Answers(4), Stop(), logger=CSVLogger(tmp_path, name="", version=""))
    rows = list(csv.DictReader((tmp_path / "answers.csv").read_text().splitlines()))
    assert [row["step"] for row in rows] == ["5"]
    assert (tmp_path / "answers.png").is_file()


def test_a_figure_that_is_not_wanted_is_not_drawn_and_an_author_may_draw_another(tmp_path: Path) -> None:
    run(Answers(4, figure=False), logger=CSVLogger(tmp_path / "none", name="", version=""), max_epochs=1)
    assert not list(tmp_path.rglob("*.png"))

    class Own(Answers):
        def draw(self, record: RunRecord) -> Any:
            from matplotlib.figure import Figure

            return Figure(figsize=(1, 1), dpi=100)

    run(Own(4), logger=CSVLogger(tmp_path / "own", name="", version=""), max_epochs=1)
    from PIL import Image

    with Image.open(tmp_path / "own" / "own.png") as image:
        assert image.size == (150, 150)


def test_a_figure_that_fails_does_not_end_the_fit(tmp_path: Path) -> None:
    class Broken(Answers):
        def probe(self, look: ProbeLook) -> Reading:
            return dataclasses.replace(super().probe(look), pictures={"late": self.fail})

        def fail(self) -> Any:
            raise ZeroDivisionError("no figure")

        def draw(self, record: RunRecord) -> Any:
            raise KeyError("no axes")

    class After(pl.Callback):
        ended = False

        def on_train_end(self, *_: Any) -> None:
            self.ended = True

    after = After()
    with pytest.warns(UserWarning, match="could not be created") as caught:
        run(Broken(4), after, logger=CSVLogger(tmp_path, name="", version=""), max_epochs=1)
    assert [str(each.message) for each in caught if "could not be" in str(each.message)] == [
        "Broken: the figures and tables of this look could not be created: ZeroDivisionError: no figure",
        "Broken: the figure of the run could not be created: KeyError: 'no axes'",
    ]
    assert after.ended
    assert (tmp_path / "broken.csv").is_file()


# Pictures.


@pytest.mark.parametrize(
    "pixels", [np.zeros((4, 4)), np.zeros((3, 4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros(4, np.uint8)]
)
def test_what_is_no_picture_of_bytes_is_refused(pixels: Any) -> None:
    with pytest.raises(ValueError, match=r"pixels must be uint8 of shape \(H, W\) or \(H, W, 3\); got"):
        Picture(pixels)
