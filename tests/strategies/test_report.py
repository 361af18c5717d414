"""What a run leaves in its folder, and in an offline run of W&B, which is read back."""

import csv
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from lightning_grad.strategies import DGCStrategy
from lightning_grad.strategies._ledger import ByteLedger
from lightning_grad.strategies._report import draw
from lightning_grad.testing import on_ranks
from lightning_grad.utilities import reporting
from tests.strategies.ranks import fit, said
from tests.wandb_offline import items, parsed

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def _train_with_wandb(folder: Path) -> None:
    import wandb

    logger = WandbLogger(project="project", save_dir=folder, offline=True)
    fit(DGCStrategy(ratio=0.1, warmup=None), logger=logger)
    wandb.finish()
    wandb.teardown()


def test_an_offline_run_of_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staging"))
    wandb.teardown()  # of another test's run, whose settings would stay
    on_ranks(1, _train_with_wandb, tmp_path)
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    history: list[dict[str, Any]] = []
    for record in parsed(path):
        config.update(items(record.config.update) if record.HasField("config") else ())
        summary.update(items(record.summary.update) if record.HasField("summary") else ())
        history += [dict(items(record.history.item))] if record.HasField("history") else []
    assert config["DGCStrategy"]["ratio"] == 0.1
    assert config["DGCStrategy"]["correction"] == "auto"
    rows = [row for row in history if "comm/bytes_sent" in row]
    assert len(rows) == 12
    assert {"comm/ratio", "comm/residual_norm", "comm/compress_ms", "comm/density"} <= set(rows[0])
    assert summary["comm/final_ratio"] == pytest.approx(rows[-1]["comm/ratio"])
    assert summary["comm/total_megabytes"] == pytest.approx(sum(row["comm/bytes_sent"] for row in rows) / 1e6)
    shown = {"/".join(key.split("/")[:2]) for row in history for key in row}
    assert {"comm/summary", "comm/record", "comm/layers"} <= shown, "the figure and the tables"


def _train_without_matplotlib(folder: Path) -> list[str]:
    with pytest.MonkeyPatch.context() as patch, said() as lines:
        patch.setattr(reporting, "is_installed", lambda name: name != "matplotlib")
        options = {"logger": CSVLogger(folder, "", ""), "log_every_n_steps": 1000}
        fit(DGCStrategy(ratio=0.1, warmup=None), **options)
    return lines


def test_a_figure_that_cannot_be_drawn_is_told_and_tables_of_a_short_run_are_there(tmp_path: Path) -> None:
    first, second = on_ranks(2, _train_without_matplotlib, tmp_path)
    words = (
        "Figures need matplotlib, which is not installed. Without figures: DGCStrategy. "
        "Run: pip install 'lightning-grad[plot]'."
    )
    assert words in first
    assert words not in second
    assert list(tmp_path.rglob("dgc_strategy_layers.csv"))
    (row,) = csv.DictReader((tmp_path / "dgc_strategy.csv").read_text().splitlines())
    assert row["step"] == "12", "the last step stands for a run without a log step"
    assert float(row["bytes_sent"]) > 0
    assert not list(tmp_path.rglob("dgc_strategy.png"))


def test_the_figure_shows_the_largest_layers_and_says_how_many_there_are() -> None:
    ledger = ByteLedger()
    ledger.open(4000)
    ledger.close()
    ledger.record.add({"step": 1, "bytes_sent": 40.0, "residual_norm": 2.0})
    layers = [{"layer": f"layer{i}", "entries": i + 1, "bytes": 4, "ratio": float(i + 1)} for i in range(30)]
    _, _, by_layer = draw("DGCStrategy", ledger, ledger.record, layers).axes
    names = [label.get_text() for label in by_layer.get_yticklabels()]
    assert names == [f"layer{i}" for i in range(29, 5, -1)]
    assert by_layer.get_title() == "Compression by layer, the largest 24 of 30"
    assert [patch.get_width() for patch in by_layer.patches] == [float(i + 1) for i in range(29, 5, -1)]
