"""A fit with the callback is that of a module with the penalty written into its step."""

import re
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_grad.callbacks import InfoBatch, LossReweighting, ZLoss
from lightning_grad.functional import z_loss
from lightning_grad.testing import make_trainer, on_ranks

C = 0.1


class Plain(pl.LightningModule):
    """A classifier with large logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
        nn.init.constant_(self.net[2].bias, 3.0)
        self.losses: list[Tensor] = []

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits, y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(self.net(batch[0]), batch[1])
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.05)


class ByHand(Plain):
    """Has the penalty in its step."""

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        return super().loss(logits, y) + z_loss(logits, C)


class Naive(Plain):
    """Adds the value of the penalty to what the step returns."""

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        return super().loss(logits, y) + z_loss(logits.detach(), C)


class HandWritten(Plain):
    """Its loss cannot be seen."""

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        return -logits.log_softmax(1).gather(1, y[:, None]).mean()


class OnlyAMetric(Plain):
    """Computes a cross-entropy with a graph, and trains on something else."""

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        F.cross_entropy(logits, y)
        return F.mse_loss(logits, F.one_hot(y, 5).float())


class Manual(Plain):
    """The first of its backward passes is of another loss."""

    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer = self.optimizers()
        for loss in (lambda x, y: self.net(x).square().mean(), lambda x, y: self.loss(self.net(x), y)):
            optimizer.zero_grad()
            self.manual_backward(loss(*batch))
            optimizer.step()


class ManualByHand(Manual, ByHand):
    """Has the penalty in its step."""


class ManualHandWritten(Manual, HandWritten):
    """Its loss cannot be seen."""


def loader() -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(24, 6, generator=generator), torch.arange(24) % 5), 8)


def fit(kind: type[Plain], *callbacks: pl.Callback, **arguments: Any) -> Plain:
    module = kind()
    trainer = make_trainer(callbacks=list(callbacks), **{"max_epochs": 2, "log_every_n_steps": 1, **arguments})
    trainer.fit(module, loader())
    return module


def scaled() -> dict[str, Any]:
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=16.0))]}


@pytest.mark.parametrize(
    "arguments",
    [
        dict,
        lambda: {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
        lambda: {"precision": "bf16-mixed"},
        scaled,
    ],
    ids=["plain", "accumulation", "bf16", "fp16"],
)
def test_a_fit_is_that_of_the_penalty_by_hand(arguments: Any) -> None:
    by_hand = fit(ByHand, **arguments())
    found = fit(Plain, ZLoss(C), **arguments())
    torch.testing.assert_close(found.state_dict(), by_hand.state_dict())
    naive = fit(Naive, **arguments())
    assert (naive.net[2].bias - by_hand.net[2].bias).abs().max() > 1e-3
    assert torch.equal(found.losses[0], fit(Plain, **arguments()).losses[0])  # the step's own value stays


def test_manual_optimization() -> None:
    found, by_hand, without = fit(Manual, ZLoss(C)), fit(ManualByHand), fit(Manual)
    torch.testing.assert_close(found.state_dict(), by_hand.state_dict())
    assert (without.net[2].bias - by_hand.net[2].bias).abs().max() > 1e-3


def _on_rank() -> list[Any]:
    arguments = {"strategy": "ddp", "devices": 2, "max_epochs": 1}
    return [fit(*each, **arguments).state_dict() for each in ((Plain, ZLoss(C)), (ByHand,), (Plain,))]


def test_two_ranks() -> None:
    for found, by_hand, without in on_ranks(2, _on_rank):
        torch.testing.assert_close(found, by_hand)
        with pytest.raises(AssertionError):
            torch.testing.assert_close(without, by_hand)


def test_logs() -> None:
    class Trace(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
            logits = batch[0] @ torch.eye(6)[:, :5] * 2
            self.wanted = logits.logsumexp(1).square()[batch[1] != 1].mean()

    class Fixed(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            logits = batch[0] @ torch.eye(6)[:, :5] * 2 + 0 * self.net(batch[0])
            each = F.cross_entropy(logits, batch[1], ignore_index=1, reduction="none")
            return each.mean() + F.cross_entropy(logits.flip(0), batch[1].flip(0), ignore_index=1)

    trace = Trace()
    trainer = make_trainer(callbacks=[ZLoss(C), trace], max_epochs=1, log_every_n_steps=1)
    trainer.fit(Fixed(), loader())
    assert float(trainer.callback_metrics["loss/z_loss"]) == pytest.approx(C * float(trace.wanted), rel=1e-5)
    assert float(trainer.callback_metrics["loss/log_z"]) == pytest.approx(float(trace.wanted.sqrt()), rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (HandWritten, r"first backward pass went through none\. Compute the loss with cross_entropy, or .*z_loss"),
        (OnlyAMetric, r"went through none of them \(found mse_loss\)"),
        (ManualHandWritten, "went through none"),
    ],
)
def test_a_loss_that_cannot_be_seen_ends_the_first_step(kind: type[Plain], words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        fit(kind, ZLoss())
    fit(kind, ZLoss(0.0), max_epochs=1)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_without_a_loss_are_skipped(accumulate: int) -> None:
    def skips(kind: type[Plain]) -> type[Plain]:
        class Skips(kind):  # type: ignore[misc, valid-type]
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                return None if batch_idx == 0 else super().training_step(batch, batch_idx)

        return Skips

    arguments = {"accumulate_grad_batches": accumulate}
    by_hand = fit(skips(ByHand), **arguments)
    torch.testing.assert_close(fit(skips(Plain), ZLoss(C), **arguments).state_dict(), by_hand.state_dict())
    with pytest.raises(RuntimeError, match="went through none"):
        fit(skips(HandWritten), ZLoss())


@pytest.mark.parametrize(
    "make", [lambda: (ZLoss(), InfoBatch()), lambda: (LossReweighting(), ZLoss()), lambda: (ZLoss(), ZLoss(name="b"))]
)
def test_one_writer_of_a_loss(make: Any) -> None:
    callbacks = make()
    names = " and ".join(callback.display_name for callback in callbacks)
    with pytest.raises(ValueError, match=re.escape(f"{names} would both change the loss of a step. Keep one")):
        fit(Plain, *callbacks)
