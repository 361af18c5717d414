"""The benchmark of fine-tuning runs, and counts bytes exactly. Nothing about speed."""

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from benchmarks import fine_tuning

# What Lightning says about itself and about fits of a few steps.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
]
WIDTH, BATCH = 16, 4


class Layers(LightningModule):
    """Two linear layers, as in a block of a transformer, a small one, and AdamW."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"linear1": nn.Linear(WIDTH, WIDTH), "linear2": nn.Linear(WIDTH, WIDTH)})
        self.head = nn.Linear(WIDTH, 1, bias=False)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.head(self.block["linear2"](torch.relu(self.block["linear1"](batch[0])))).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Train small layers, and undo what the script sets for the whole process."""
    monkeypatch.setattr(fine_tuning, "transformer", lambda: (Layers(), (torch.randn(BATCH, WIDTH),)))
    monkeypatch.setattr(fine_tuning, "STEPS", 2)
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels, threads = [logger.level for logger in loggers], torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def test_it_measures_everything(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fine_tuning.main(["--quick", "--out", str(tmp_path / "speed.json")])
    assert "Budgets missed:" in capsys.readouterr().out
    tables = json.loads((tmp_path / "speed.json").read_text())
    names = [fine_tuning.DENSE, *fine_tuning.VARIANTS]
    assert [row["name"] for row in tables[fine_tuning.STEPS_OF]] == [*names, f"{fine_tuning.DENSE}, again"]
    assert [row["name"] for row in tables[fine_tuning.UNLEARNING]] == ["dense", "SaliencyUnlearning", "dense, again"]
    for title in (fine_tuning.STATE, fine_tuning.SAVED, fine_tuning.NEEDED):
        assert [row["name"] for row in tables[title]] == names


def test_bytes_of_a_dense_fit_are_counted_exactly() -> None:
    found = fine_tuning.bytes_of(fine_tuning.Variant(list), "cpu")
    entries = 2 * (WIDTH * WIDTH + WIDTH) + WIDTH
    assert found[fine_tuning.STATE] == pytest.approx(2 * 4 * entries, abs=64), "two moments, and the counts of steps"
    # The input of each layer, the first of which is the batch, and the output of the last one.
    assert found[fine_tuning.SAVED] == 4 * (3 * BATCH * WIDTH + BATCH)
    assert found[fine_tuning.NEEDED] == found[fine_tuning.STATE] + found[fine_tuning.SAVED] + 4 * entries


def test_frozen_layers_save_less() -> None:
    class Freeze(fine_tuning.Callback):  # type: ignore[name-defined, misc]
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            pl_module.block["linear1"].requires_grad_(False)

    few, all_bytes = (fine_tuning.bytes_of(fine_tuning.Variant(make), "cpu") for make in (lambda: [Freeze()], list))
    assert all(few[title] < all_bytes[title] for title in all_bytes)
