"""The benchmark of batch sizes runs, and its layers by hand divide their batch. Nothing about speed."""

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from plain_project import ResidualConvNet
from torch import nn

from benchmarks import batch_size

# What Lightning says about itself and about fits of a few steps.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
]


@pytest.fixture(autouse=True)
def _lightnings_own_log_level() -> Iterator[None]:
    """Undo what the script sets for the whole process."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels, threads = [logger.level for logger in loggers], torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def small() -> Any:
    module = ResidualConvNet(channels=3, width=2, blocks_per_stage=(1,), schedule="constant")
    return module, (torch.randn(32, 3, 4, 4), torch.randint(10, (32,)))


def test_it_measures_everything(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(batch_size, "convnet", small)
    monkeypatch.setattr(batch_size, "STEPS", 4)
    batch_size.main(["--quick", "--out", str(tmp_path / "speed.json")])
    assert "Budgets missed:" in capsys.readouterr().out
    tables = json.loads((tmp_path / "speed.json").read_text())
    for title, makes in ((batch_size.STEPS_OF, batch_size.variants), (batch_size.ACCUMULATED, batch_size.accumulating)):
        assert all(row["ratio"] > 0 for row in tables[title])
        assert {row["name"] for row in tables[title]} == set(makes())


def test_layers_by_hand_divide_their_batch() -> None:
    module = batch_size.chunked(small()[0])
    layers = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
    layers[0](torch.randn(8, 2, 4, 4))
    assert layers[0].num_batches_tracked == 2
