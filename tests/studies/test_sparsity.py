"""The N:M study and the demo run; what they write can be read back, W&B's offline runs too."""

import csv
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import plain_project
import pytest
import torch

from lightning_grad.functional import is_nm
from studies import clipping, common, demo, sparsity
from studies.common import read_curve
from studies.sparsity import Result, Study, draw_comparison, parse, print_table, run_study
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


OTHER_PARTS = (
    "clipping/comparison.png",
    "clipping/results.csv",
    "clipping/none_seed0/steps.csv",
    "data_pruning/label_errors.png",
    "data_pruning/label_errors.csv",
    "data_pruning/scores/el2n_flip0.1_seed0/data_pruning_epoch3_samples.png",
    "adversarial/digits.png",
    "adversarial/robustness.png",
    "adversarial/rates.png",
    "adversarial/results.csv",
    "communication/comparison.png",
    "communication/results.csv",
    "communication/dgc-99.9_seed0/dgc_strategy.png",
)


def write_stand_ins(folder: Path) -> None:
    """Stand in for what the other parts of the demo write; the tests of their studies run them."""
    for name in OTHER_PARTS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


class Run(NamedTuple):
    study: Study
    results: list[Result]
    printed: str


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Train dense and one recipe for a moment, logging to W&B offline."""
    pytest.importorskip("wandb")
    output = tmp_path_factory.mktemp("study")
    study = Study(
        recipes=["mdgf-exponential"], epochs=2, limit_batches=4, wandb="offline", output=output, accelerator="cpu"
    )
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
        patch.setenv("WANDB_MODE", "offline")
        results = run_study(study)
        print_table(results, study)
        print(demo.PLACES.format(folder=output))
        write_stand_ins(output)
    return Run(study, results, "\n".join(lines))


def test_every_training_has_a_result(run: Run) -> None:
    assert [(result.recipe, result.seed) for result in run.results] == [("dense", 0), ("mdgf-exponential", 0)]
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
    assert [row["recipe"] for row in rows] == ["dense", "mdgf-exponential"]
    assert float(rows[1]["test_accuracy"]) == run.results[1].test_accuracy
    assert rows[1]["loads_strictly"] == "True"


def test_table_and_places_are_printed(run: Run) -> None:
    lines = run.printed.splitlines()
    assert any(line.startswith("mdgf-exponential") and "12 of 12" in line and "same logits" in line for line in lines)
    assert any(line.startswith("recipe") and "exactly 1:8" in line for line in lines)
    assert max(map(len, lines)) <= 80 + len(str(run.study.output))
    named = [line.split()[0] for line in lines if line.startswith("  ") and not line.startswith("   ")]
    assert len(named) == 19
    for name in named:
        assert list(run.study.output.glob(name.replace("<recipe>", "mdgf-exponential"))), name


def test_the_checkpoint_is_exact_by_itself(run: Run) -> None:
    stored = torch.load(run.study.folder("mdgf-exponential", 0) / "last.ckpt")["state_dict"]
    weights = [value for name, value in stored.items() if "encoder.layers" in name and value.ndim == 2]
    assert len(weights) == 12
    assert all(is_nm(weight, 1, 8) for weight in weights)
    assert set(stored) == set(sparsity.build_module(run.study).state_dict())


def test_a_checkpoint_of_other_weights_is_noticed(run: Run) -> None:
    other, images = sparsity.build_module(run.study), torch.randn(4, 1, 8, 8)
    checkpoint = run.study.folder("dense", 0) / "last.ckpt"
    assert not sparsity.loads_strictly(run.study, other, checkpoint, images)


def test_the_figures_are_images(run: Run) -> None:
    paths = [run.study.output / "comparison.png", run.study.folder("mdgf-exponential", 0) / "nm_sparsity.png"]
    for path in paths:
        assert path.read_bytes().startswith(PNG)
    assert paths[0].stat().st_size < 200_000


def test_the_comparison_shows_what_was_logged(run: Run) -> None:
    figure = draw_comparison(run.study)
    accuracy, density, flips = figure.axes
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["dense", "mdgf-exponential"]
    assert [len(axis.lines) for axis in (accuracy, density, flips)] == [2, 1, 1]
    for axis in figure.axes:
        assert axis.get_title(loc="left")
    logged = read_curve(run.study.folder("mdgf-exponential", 0) / "metrics.csv", "sparsity/density")
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
    assert {kept.group for kept in offline.values()} == {"VisionTransformer 1:8"}


def test_offline_run_holds_the_scalars_of_the_csv(run: Run, offline: dict[str, Offline]) -> None:
    history = offline["mdgf-exponential_seed0"].history
    for key in ("sparsity/density", "sparsity/decay", "sparsity/flips", "sparsity/exact", "val_acc", "train_loss"):
        sent = {row["trainer/global_step"] + 1: row[key] for row in history if key in row}
        assert sent == pytest.approx(read_curve(run.study.folder("mdgf-exponential", 0) / "metrics.csv", key))
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


# The table, the progress, the command line.


def test_several_seeds_are_averaged(capsys: pytest.CaptureFixture[str]) -> None:
    results = [
        Result("dense", 0, 0.98, 0, 0, 9.0, 10.0, True),
        Result("ste", 0, 0.90, 3, 4, 9.0, 11.0, True),
        Result("dense", 1, 0.96, 0, 0, 9.0, 20.0, True),
        Result("ste", 1, 0.92, 4, 4, 9.0, 26.0, False),
    ]
    print_table(results, Study("2:4", seeds=2))
    header, _, dense, ste, *_ = capsys.readouterr().out.splitlines()
    assert "exactly 2:4" in header
    assert dense.split() == ["dense", "97.0", "±", "1.4", "%", "-", "1.00", "x", "same", "logits"]
    assert ste.split() == ["ste", "91.0", "±", "1.4", "%", "7", "of", "8", "1.20", "x", "OTHER", "LOGITS"]


@pytest.mark.parametrize("rich_is_there", [True, False])
def test_without_a_terminal_or_rich_a_line_tells_of_each_end(
    rich_is_there: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not rich_is_there:
        monkeypatch.setitem(sys.modules, "rich.progress", None)
    with common.progress(["ste"], seeds=2) as show:
        show("ste", 0, 0.5, 0.4)
        show("ste", 0, 1.0, 0.9)
    assert capsys.readouterr().out.split() == ["ste", "seed", "0", "validation", "90.0", "%"]


def test_in_a_terminal_each_recipe_has_a_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with common.progress(["dense", "ste"], seeds=2) as show:
        show("ste", 1, 0.5, 0.9)
    printed = capsys.readouterr().out
    assert "75%" in printed
    assert "90.0 %" in printed


def test_command_line() -> None:
    assert parse([]) == Study()
    given = parse(["--pattern", "2:4", "--recipes", "ste", "step", "--seeds", "3", "--wandb", "--epochs", "4"])
    assert given == Study(pattern="2:4", recipes=["ste", "step"], seeds=3, wandb="offline", epochs=4)
    assert parse(["--wandb", "online", "--data-folder", "here"]).data_folder == Path("here")
    with pytest.raises(SystemExit):
        parse(["--recipes", "magic"])


def test_convolutions_by_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--model ResidualConvNet --pattern 2:4 --recipes sdgf-stepwise --epochs 1 --limit-batches 3"
    sparsity.main([*options.split(), "--accelerator", "cpu", "--output", str(tmp_path)])
    assert "8 of 8" in capsys.readouterr().out
    assert not (tmp_path / "wandb").exists()


# The demo.


def test_demo_runs_all_studies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Study] = []
    results = [Result(recipe, 0, 0.9, 12, 12, 1.0, 1.0, True) for recipe in ("dense", "sr-ste", "mdgf-exponential")]
    monkeypatch.setattr(sparsity, "run_study", lambda study: asked.append(study) or results)
    clipped: list[clipping.Study] = []
    trained = [clipping.Result(rule, 0, 0.8, 400.0, 1.0, 0.9, 0.9, 0, "saved") for rule in clipping.RULES]
    monkeypatch.setattr(clipping, "run_study", lambda study: clipped.append(study) or trained)
    others: list[tuple[str, Path, int]] = []
    for part in ("find_label_errors", "attack_inputs", "compress_gradients"):
        monkeypatch.setattr(demo, part, lambda output, size, part=part: others.append((part, output, size)))
    demo.main(tmp_path)
    recipes = ("sr-ste", "mdgf-exponential")
    assert asked == [Study("1:8", recipes, seeds=3, epochs=12, output=tmp_path, wandb="offline", accelerator="cpu")]
    assert clipped == [clipping.Study(seeds=3, output=tmp_path / "clipping", accelerator="cpu")]
    assert others == [
        ("find_label_errors", tmp_path / "data_pruning", 3),
        ("attack_inputs", tmp_path / "adversarial", 20),
        ("compress_gradients", tmp_path / "communication", 20),
    ]
    printed = capsys.readouterr().out
    assert str(tmp_path) in printed
    assert max(len(line.replace(str(tmp_path), "")) for line in printed.splitlines()) <= 88
