"""Which layers a batch reaches first and last is what rank 0 saw, on all ranks: another choice would part their weights."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_grad.callbacks import AdaptiveGradientClipping, NMSparsity
from lightning_grad.testing import make_trainer, on_ranks


class Moody(pl.LightningModule):
    """Uses its layers in another order on every rank."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0]
        for number in range(4):
            x = self.layers[(number + 1 + self.global_rank) % 4](x)
        return F.mse_loss(x, batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def _fit(build: Any) -> tuple[list[Tensor], list[str]]:
    generator = torch.Generator().manual_seed(1)
    loader = DataLoader(TensorDataset(torch.randn(16, 8, generator=generator)), 4)
    module, callback = Moody(), build()
    found: list[str] = []

    def read(*_: Any) -> None:
        found[:] = callback._heads.names if hasattr(callback, "_heads") else sorted(callback.signatures)

    callbacks = [callback, LambdaCallback(on_train_end=read)]
    trainer = make_trainer(callbacks=callbacks, devices=2, strategy="ddp", max_epochs=2, use_distributed_sampler=False)
    trainer.fit(module, loader)
    return [parameter.detach() for parameter in module.parameters()], found


def test_all_ranks_choose_what_the_first_saw() -> None:
    for build, chosen in (
        (lambda: NMSparsity("1:4", "sr-ste", figure=False), ["layers.2.weight", "layers.3.weight"]),
        (lambda: AdaptiveGradientClipping(1e-3), ["layers.0"]),
    ):
        (first, names), (second, others) = on_ranks(2, _fit, build)
        assert names == others == chosen
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
