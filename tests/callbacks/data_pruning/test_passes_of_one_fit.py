"""GraNd passes of one fit share what they learned of the network; nothing of it outlives the fit."""

import gc
import weakref
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
from lightning_grad.functional import PerSampleGradientNorms
from lightning_grad.functional.gradients._ghost import graph
from lightning_grad.testing import make_trainer

SAMPLES, BATCH = 24, 4
DATA = torch.randn(SAMPLES, BATCH, 5, generator=torch.Generator().manual_seed(0)), torch.arange(SAMPLES) % 3


class Sequences(pl.LightningModule):
    """Reads as many positions as a batch has samples; from epoch 2 on it puts positions first, and trains all layers."""

    def __init__(self, changes: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.changes = nn.Linear(5, 6), nn.Linear(6, 3), changes
        if changes:
            self.first.requires_grad_(False)
        self.by_hand: dict[int, Tensor] = {}

    def logits(self, x: Tensor) -> Tensor:
        turned = self.changes and self.current_epoch >= 2
        out: Tensor = self.second(self.first(x.transpose(0, 1) if turned else x).tanh())
        return (out.transpose(0, 1) if turned else out).mean(1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.logits(batch[0]), batch[1])

    def on_train_epoch_end(self) -> None:
        if self.current_epoch == 1:
            self.first.requires_grad_()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class ByHand(pl.Callback):
    """Computes the scores of each epoch, one sample at a time."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        trained = [p for p in pl_module.parameters() if p.requires_grad]
        losses = F.cross_entropy(pl_module.logits(DATA[0]), DATA[1], reduction="none")
        found = [torch.autograd.grad(loss, trained, retain_graph=True) for loss in losses]
        pl_module.by_hand[trainer.current_epoch] = torch.stack([nn.utils.get_total_norm(g) for g in found])


@pytest.mark.parametrize("changes", [False, True])
def test_layouts_are_learned_once_unless_the_network_changes(
    changes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probed, made = list[int](), list[Any]()
    probe, begin = graph.probe_layouts, PerSampleGradientNorms.__init__

    def counted(*arguments: Any, **more: Any) -> Any:
        probed.append(1)
        return probe(*arguments, **more)

    def noted(self: PerSampleGradientNorms, *arguments: Any) -> None:
        made.append(weakref.ref(self))
        begin(self, *arguments)

    monkeypatch.setattr(graph, "probe_layouts", counted)
    monkeypatch.setattr(PerSampleGradientNorms, "__init__", noted)
    path = str(tmp_path / "scores.npz")
    callback = DataPruning([0.0, 0.0, 0.0], "grand", epoch=[1, 2, 3], save_scores=path, figure=False)
    module = Sequences(changes)
    trainer = make_trainer(callbacks=[ByHand(), callback], max_epochs=4)
    gc.disable()
    try:
        trainer.fit(module, DataLoader(TensorDataset(*DATA), BATCH))
        assert len(made) == 1
        assert made[0]() is None  # without the garbage collector, so nothing refers to it in a circle
    finally:
        gc.enable()
    assert len(probed) == (2 if changes else 1)
    for epoch in (1, 2, 3):
        found = load_scores(path.replace(".npz", f"_epoch{epoch}.npz")).values
        torch.testing.assert_close(torch.as_tensor(found), module.by_hand[epoch].double(), rtol=1e-4, atol=0)
    saved = callback.state_dict()
    assert not any(isinstance(value, (nn.Module, PerSampleGradientNorms)) for value in saved.values())
    assert "norms" not in str(saved)
