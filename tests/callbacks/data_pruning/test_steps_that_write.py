"""Scores of a step that writes into its batch are those of the same step that writes nowhere, however often it is run."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_grad.callbacks import DataPruning
from lightning_grad.data import load_scores
from lightning_grad.testing import make_trainer

SAMPLES, WIDTH, CLASSES = 16, 5, 3


class Normalises(pl.LightningModule):
    """Logs a second loss, and differentiates by its input, so that a score runs its step several times."""

    def __init__(self, way: str, twice: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.way, self.twice = nn.Linear(WIDTH, CLASSES), way, twice

    def taken(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        if self.way == "nowhere":
            return (batch["x"] - 0.7) * 2, (batch["y"] + 1) % CLASSES
        if self.way == "in place":
            return batch["x"].sub_(0.7).mul_(2), batch["y"].add_(1).remainder_(CLASSES)
        return (batch.pop("x") - 0.7) * 2, (batch.pop("y") + 1) % CLASSES

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        x, y = self.taken(batch)
        logits = self.net(x)
        if self.twice:
            self.log("shown", F.cross_entropy(logits.detach(), y))
        return F.cross_entropy(logits, y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def collate(samples: list[Any]) -> dict[str, Any]:
    x, y = (torch.stack(column) for column in zip(*samples, strict=True))
    return {"x": x, "y": y}


def scores(way: str, twice: bool, score: str, folder: Path) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(SAMPLES, WIDTH, generator=generator), torch.arange(SAMPLES) % CLASSES)
    callback = DataPruning(0.25, epoch=1, score=score, save_scores=str(folder / f"{way}.npz"))
    trainer = make_trainer(callbacks=[callback], max_epochs=2)
    trainer.fit(Normalises(way, twice), DataLoader(data, 4, collate_fn=collate))
    return torch.as_tensor(load_scores(folder / f"{way}.npz").values)


@pytest.mark.parametrize("score", ["el2n", "grand", "prototypes"])
@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("way", ["in place", "popped"])
def test_scores_are_those_of_a_step_that_writes_nowhere(way: str, twice: bool, score: str, tmp_path: Path) -> None:
    assert torch.equal(scores(way, twice, score, tmp_path), scores("nowhere", twice, score, tmp_path))
