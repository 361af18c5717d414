"""The benchmark of optimizers runs, and its bytes are exact. Nothing about speed."""

import json
import logging
from collections.abc import Iterator

import pytest
import torch

from benchmarks import optimizers

pytest.importorskip("pytorch_optimizer")
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


class Small(optimizers.SmallTransformer):
    """The transformer, with one layer of it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder.layers = self.encoder.layers[:1]
        self.encoder.num_layers = 1


def test_it_measures_state_and_steps(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(optimizers, "SmallTransformer", Small)
    monkeypatch.setattr(optimizers, "STEPS", 2)
    monkeypatch.setattr(optimizers, "STEP_BUDGET", None)
    kept = {"dct-adamw": ({"rank": 32}, 0.7), "frugal": ({"density": 0.25}, 0.8)}  # one layer has few hidden matrices
    monkeypatch.setattr(optimizers, "MATRICES", kept)
    monkeypatch.setattr(optimizers, "batch_of", lambda: (torch.randn(1, 2, 256), torch.randn(1, 2, 256)))
    optimizers.main(["--quick", "--out", str(tmp_path / "speed.json")])
    assert "Budgets missed: nothing." in capsys.readouterr().out
    tables = json.loads((tmp_path / "speed.json").read_text())
    tables = tables.get("tables", tables)
    ratios = {row["name"]: row["ratio"] for row in tables[optimizers.STATE]}
    assert ratios["OptimizerSwap('lion')"] == pytest.approx(0.5, abs=1e-3)
    assert ratios["OptimizerSwap('adafactor')"] < 0.01
    ratios = {row["name"]: row["ratio"] for row in tables[optimizers.OF_MATRICES]}
    assert ratios["OptimizerSwap('dct-adamw'), rank=32"] < ratios["OptimizerSwap('frugal'), density=0.25"] < 1.0
    assert [row["name"] for row in tables[optimizers.MATRIX_STEPS]] == [
        "AdamW",
        "OptimizerSwap('dct-adamw'), rank=32",
        "AdamW, again",
    ]
    assert [row["name"] for row in tables[optimizers.STEPS_OF]] == [
        "lion in the module",
        "OptimizerSwap('lion')",
        "lion in the module, again",
        "adamw with a group for each layer",
        "LayerwiseLearningRateDecay",
        "adamw with a group for each layer, again",
    ]
