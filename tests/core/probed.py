"""A module, data and probes for the tests of ``ProbeCallback``: whatever can be disturbed by a look is in use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_grad.core import ProbeCallback, ProbeLook, Reading
from lightning_grad.testing import ResumableLoader

SAMPLES = 24


class Augmented(Dataset):
    """Samples that differ each time they are read, by the global random numbers and by those of its own."""

    def __init__(self, seed: int = 0, noise: float = 0.1) -> None:
        self.x = torch.randn(SAMPLES, 4, generator=torch.Generator().manual_seed(seed))
        self.noise = noise
        self.generator = np.random.default_rng(seed)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        jitter = torch.rand(4) + float(self.generator.random())
        return self.x[index] + self.noise * jitter, index % 3


class Noisy(pl.LightningModule):
    """Batch norm, dropout and metrics with a state."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(8, 3)
        self.accuracy = MulticlassAccuracy(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=self.trainer.world_size > 1)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y), sync_dist=self.trainer.world_size > 1)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.05)


class Answers(ProbeCallback):
    """Note the batch, the modes and the logits of each look, and log the mean logit."""

    namespace = "answers"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seen: list[dict[str, Any]] = []
        self.meets: Callable[[ProbeLook], Any] = lambda look: None
        super().__init__(*args, **kwargs)

    @property
    def settings(self) -> dict[str, Any]:
        names = ("samples", "every_n_epochs", "every_n_steps", "split", "loader_key", "figure", "name")
        return {name: getattr(self, name) for name in names}

    def probe(self, look: ProbeLook) -> Reading:
        x = look.batch[0]
        logits = look.pl_module(x)
        self.seen.append({"x": x.clone(), "step": look.step, "epoch": look.epoch, "indices": look.indices})
        self.meets(look)
        return Reading({"mean": logits.mean(), "drawn": float(torch.rand(1))}, arrays={"logits": logits})


def make_noisy() -> Noisy:
    pl.seed_everything(5, verbose=False)
    return Noisy()


def noisy_loaders(resumable: bool = False) -> tuple[DataLoader, DataLoader]:
    if resumable:  # in fixed order and without noise: Lightning restores no random numbers
        return ResumableLoader(Augmented(noise=0.0), 4), DataLoader(Augmented(1, noise=0.0), 8)
    return DataLoader(Augmented(), 4, shuffle=True), DataLoader(Augmented(1), 8)
