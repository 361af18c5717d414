"""The demo: its six parts run, print what their columns mean, and write what the last lines promise."""

from pathlib import Path

import pytest
from lightning.pytorch import LightningModule
from plain_project import Digits

from studies import demo
from studies.claims import quantization

# What Lightning and torch say about themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*use of fork\\(\\) may lead to deadlocks:DeprecationWarning"),
]


def _export_nothing(module: LightningModule, data: Digits, folder: Path) -> tuple[float, ...]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").touch()
    return 0.9, 1000.0, 800.0, 4000.0, 0.0, 0.4


def test_demo_runs_all_parts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(quantization, "export", _export_nothing)  # test_quantization.py exports this study's networks
    asked = {"epochs": 1, "steps": 40, "seeds": 1, "attacked_epochs": 1, "compressed_epochs": 1, "exported_epochs": 1}
    demo.main(tmp_path, **asked)
    printed = capsys.readouterr().out
    assert max(len(line.replace(str(tmp_path), "")) for line in printed.splitlines()) <= 88
    for words in (
        "exactly 1:8",
        "NormClipping(1.0)",
        "140 of 1400 labels are wrong",
        "robust",
        "powersgd-4",
        "sparse 8 bits",
    ):
        assert words in printed
    named = [line.split()[0] for line in demo.PLACES.splitlines() if line.startswith("  ") and line[2] != " "]
    assert len(named) == 22
    for name in named:
        assert list(tmp_path.glob(name.replace("<recipe>", "mdgf-exponential"))), name
