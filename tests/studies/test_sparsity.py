"""The N:M study and the demo run; what they write can be read back, W&B's offline runs too."""

import csv
import json
from pathlib import Path
from typing import Any, NamedTuple

import plain_project
import pytest
import torch

from lightning_grad.functional import is_nm
from studies import demo
from studies.claims import sparsity
from studies.claims.sparsity import Result, Sparsity
from studies.common import read_curve
from studies.figures.sparsity import draw_comparison, print_table
from studies.report import write
from studies.runner import train_all
from tests.wandb_offline import items, parsed

EXAMPLES = Path(plain_project.__file__).parents[1]
PNG = b"\x89PNG\r\n\x1a\n"

# What Lightning and torch say about themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
]


# The study, once, with W&B.


class Run(NamedTuple):
    study: Sparsity
    results: list[Result]
    printed: str


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Train dense and one recipe for a moment, logging to W&B offline."""
    pytest.importorskip("wandb")
    output = tmp_path_factory.mktemp("study")
    arms, settings = ("dense", "mdgf-exponential"), {"seeds": 1, "epochs": 2, "limit_batches": 4}
    study = Sparsity(arms=arms, rates=(), wandb="offline", output=output, **settings)
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
        patch.setenv("WANDB_MODE", "offline")
        results = train_all(study, 1)
        write(study, results)
    return Run(study, results, "\n".join(lines))


def test_every_training_has_a_result(run: Run) -> None:
    assert [(result.arm, result.seed) for result in run.results] == [("dense", 0), ("mdgf-exponential", 0)]
    for result in run.results:
        assert 0 <= result.test_accuracy <= 1
        assert 0 < result.step_ms < 10_000
        assert 0 < result.step_quotient < 10_000
        assert result.loads_strictly
    assert (run.results[0].exact_weights, run.results[0].chosen_weights) == (0, 0)
    assert (run.results[1].exact_weights, run.results[1].chosen_weights) == (12, 12)


def test_the_numbers_are_in_a_csv(run: Run) -> None:
    with (run.study.output / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["arm"] for row in rows] == ["dense", "mdgf-exponential"]
    assert float(rows[1]["test_accuracy"]) == run.results[1].test_accuracy
    assert rows[1]["loads_strictly"] == "True"


def test_table_and_places_are_printed(run: Run) -> None:
    lines = run.printed.splitlines()
    assert any(line.startswith("mdgf-exponential") and "12 of 12" in line and "same logits" in line for line in lines)
    assert any(line.startswith("recipe") and "exactly 1:8" in line for line in lines)
    assert max(map(len, lines)) <= 80 + len(str(run.study.output))
    named = [line.split()[0] for line in demo.PLACES.splitlines() if line.startswith("  ") and line[2] != " "]
    assert len(named) == 22
    for name in named[:6]:
        assert list(run.study.output.glob(name.replace("<recipe>", "mdgf-exponential"))), name


def test_the_checkpoint_is_exact_by_itself(run: Run) -> None:
    stored = torch.load(run.study.folder(run.results[1]) / "last.ckpt")["state_dict"]
    weights = [value for name, value in stored.items() if "encoder.layers" in name and value.ndim == 2]
    assert len(weights) == 12
    assert all(is_nm(weight, 1, 8) for weight in weights)
    assert set(stored) == set(sparsity.build_module(run.study).state_dict())


def test_a_checkpoint_of_other_weights_is_noticed(run: Run) -> None:
    other, images = sparsity.build_module(run.study), torch.randn(4, 1, 8, 8)
    checkpoint = run.study.folder(run.results[0]) / "last.ckpt"
    assert not sparsity.loads_strictly(run.study, other, checkpoint, images)


def test_the_figures_are_images(run: Run) -> None:
    paths = [run.study.output / "comparison.png", run.study.folder(run.results[1]) / "nm_sparsity.png"]
    for path in paths:
        assert path.read_bytes().startswith(PNG)
    assert paths[0].stat().st_size < 200_000


def test_the_comparison_shows_what_was_logged(run: Run) -> None:
    figure = draw_comparison(run.study, run.results)
    accuracy, density, flips = figure.axes
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["dense", "mdgf-exponential"]
    assert [len(axis.lines) for axis in (accuracy, density, flips)] == [2, 1, 1]
    for axis in figure.axes:
        assert axis.get_title(loc="left")
    logged = read_curve(run.study.folder(run.results[1]) / "metrics.csv", "sparsity/density")
    assert density.lines[0].get_xydata().tolist() == [list(point) for point in logged.items()]
    assert logged[8] == 0.125


# W&B's offline runs.


class Offline(NamedTuple):
    folder: Path
    group: str
    history: list[dict[str, Any]]
    config: dict[str, Any]
    summary: dict[str, Any]
    artifacts: list[str]


@pytest.fixture(scope="module")
def offline(run: Run) -> dict[str, Offline]:
    """Read back every offline run, by its name."""
    found = {}
    for path in run.study.output.glob("wandb/offline-run-*/run-*.wandb"):
        rows = list(parsed(path))
        history = [dict(items(row.history.item)) for row in rows if row.HasField("history")]
        config = dict(pair for row in rows if row.HasField("config") for pair in items(row.config.update))
        summary = dict(pair for row in rows if row.HasField("summary") for pair in items(row.summary.update))
        artifacts = [row.artifact.type for row in rows if row.HasField("artifact")]
        [start] = [row.run for row in rows if row.HasField("run")]
        found[start.display_name] = Offline(path.parent, start.run_group, history, config, summary, artifacts)
    return found


def test_each_training_is_an_offline_run_of_one_group(offline: dict[str, Offline]) -> None:
    assert set(offline) == {"dense_seed0", "mdgf-exponential_seed0"}
    assert {kept.group for kept in offline.values()} == {"sparsity"}


def test_offline_run_holds_the_scalars_of_the_csv(run: Run, offline: dict[str, Offline]) -> None:
    history = offline["mdgf-exponential_seed0"].history
    for key in ("sparsity/density", "sparsity/decay", "sparsity/flips", "sparsity/exact", "val_acc", "train_loss"):
        sent = {row["trainer/global_step"] + 1: row[key] for row in history if key in row}
        assert sent == pytest.approx(read_curve(run.study.folder(run.results[1]) / "metrics.csv", key))
    assert not [key for row in offline["dense_seed0"].history for key in row if key.startswith("sparsity/")]
    assert "test_acc" in offline["dense_seed0"].history[-1]


def test_offline_run_holds_histograms_of_the_weights(offline: dict[str, Offline]) -> None:
    flat = {key: value for row in offline["mdgf-exponential_seed0"].history for key, value in row.items()}
    kinds = {key for key, value in flat.items() if key.endswith("/_type") and value == "histogram"}
    assert len(kinds) == 12
    counts = flat["sparsity_layers/weights/net.encoder.layers.0.linear1.weight/values"]
    assert sum(counts) == 64 * 128
    assert max(counts) >= 7 / 8 * 64 * 128  # the zeros


def test_offline_run_holds_the_figure_the_record_and_the_masks(offline: dict[str, Offline]) -> None:
    kept = offline["mdgf-exponential_seed0"]
    flat = {key: value for row in kept.history for key, value in row.items()}
    [image] = flat["sparsity/figure/filenames"]
    assert (kept.folder / "files" / image).read_bytes().startswith(PNG)
    table = json.loads((kept.folder / "files" / flat["sparsity/record/path"]).read_text())
    assert {"step", "density", "decay", "flips"} <= set(table["columns"])
    assert len(table["data"]) == 8
    assert "masks" in kept.artifacts


def test_offline_run_holds_settings_and_figures_of_merit(offline: dict[str, Offline]) -> None:
    kept = offline["mdgf-exponential_seed0"]
    assert kept.config["NMSparsity"]["pattern"] == "1:8"
    assert kept.config["width"] == 64
    assert kept.summary["sparsity/density"] == 0.125
    assert kept.summary["sparsity/exact"] == 1


# The table, and another model.


def test_several_seeds_are_averaged(capsys: pytest.CaptureFixture[str]) -> None:
    results = [
        Result("dense", 0, None, 0.9, 0.98, 0, 0, 9.0, 10.0, True),
        Result("ste", 0, None, 0.9, 0.90, 3, 4, 9.0, 11.0, True),
        Result("dense", 1, None, 0.9, 0.96, 0, 0, 9.0, 20.0, True),
        Result("ste", 1, None, 0.9, 0.92, 4, 4, 9.0, 26.0, False),
    ]
    print_table(Sparsity(pattern="2:4", seeds=2), results)
    header, _, dense, ste, *_ = capsys.readouterr().out.splitlines()
    assert "exactly 2:4" in header
    assert dense.split() == ["dense", "97.0", "±", "1.4", "%", "-", "1.00", "x", "same", "logits"]
    assert ste.split() == ["ste", "91.0", "±", "1.4", "%", "7", "of", "8", "1.20", "x", "OTHER", "LOGITS"]


def test_convolutions(tmp_path: Path) -> None:
    settings = {"model": "ResidualConvNet", "pattern": "2:4", "epochs": 1, "limit_batches": 3}
    claim = Sparsity(arms=["sdgf-stepwise"], rates=(), output=tmp_path, **settings)
    claim.check()
    (result,) = train_all(claim, 1)
    assert (result.exact_weights, result.chosen_weights) == (8, 8)
    assert not (tmp_path / "wandb").exists()
