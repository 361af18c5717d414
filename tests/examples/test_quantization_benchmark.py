"""The benchmark of quantization runs, and its bytes are exact. Nothing about speed."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import quantization
from benchmarks.common import SmallTransformer

# What Lightning says about itself and about fits of a few steps.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
]


@pytest.fixture(autouse=True)
def _lightnings_own_log_level() -> Iterator[None]:
    """Undo what the scripts set for the whole process."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels, threads = [logger.level for logger in loggers], torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def small() -> tuple[Any, Any]:
    module = SmallTransformer()
    module.encoder.layers, module.encoder.num_layers = module.encoder.layers[:1], 1
    return module, (torch.randn(1, 2, 256), torch.randn(1, 2, 256))


def test_it_measures_steps_and_checkpoints(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quantization, "transformer", small)
    monkeypatch.setattr(quantization, "STEPS", 2)
    monkeypatch.setattr(quantization, "BUDGETS", {})
    quantization.main(["--quick", "--out", str(tmp_path / "speed.json")])
    assert "Budgets missed: nothing." in capsys.readouterr().out
    tables = json.loads((tmp_path / "speed.json").read_text())
    names = [row["name"] for row in tables[quantization.STEPS_OF]]
    assert names == [*quantization.VARIANTS, "dense, again"]
    ratios = {row["name"]: row["ratio"] for row in tables[quantization.CHECKPOINTS]}
    assert ratios[quantization.STE] == pytest.approx(4 / 3, abs=0.02), "weights, two moments, and the dense weights"
