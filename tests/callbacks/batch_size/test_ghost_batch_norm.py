"""GhostBatchNorm against a module that divides its batches itself; what it leaves, and what it refuses."""

import copy
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_grad.callbacks import SAM, GhostBatchNorm, NMSparsity
from lightning_grad.testing import assert_identical, make_trainer

DATA = torch.randn(48, 4, generator=torch.Generator().manual_seed(0))


class Module(pl.LightningModule):
    """Two layers of BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.head(self.body(batch)) - batch.sum(1, keepdim=True)).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class ByHand(nn.BatchNorm1d):
    """Divides its batch into two chunks: every other sample."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        chunks = [nn.BatchNorm1d.forward(self, input[start::2]) for start in range(2)]
        return torch.stack(chunks, dim=1).flatten(0, 1)


class Halves(Module):
    """Divides the batches of the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body[1] = ByHand(8)


def run(*acting: Any, module: Any = None, batch: int = 8, **arguments: Any) -> Any:
    module = Module() if module is None else module
    loader = DataLoader(DATA, batch)
    make_trainer(callbacks=list(acting), **{"max_epochs": 2, **arguments}).fit(module, loader, loader)
    return module


@pytest.mark.parametrize("others", [[], [SAM(0.1)], [NMSparsity("2:4", include=["body"])]], ids=["alone", "SAM", "N:M"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_is_a_layer_that_divides_its_batch(others: list[Any], accumulate: int) -> None:
    trained = run(*copy.deepcopy(others), GhostBatchNorm(4, include=["body"]), accumulate_grad_batches=accumulate)
    by_hand = run(*copy.deepcopy(others), module=Halves(), accumulate_grad_batches=accumulate)
    for name, value in trained.state_dict().items():
        torch.testing.assert_close(value, by_hand.state_dict()[name], rtol=1e-4, atol=1e-5)
    plain = run(*copy.deepcopy(others), accumulate_grad_batches=accumulate)
    assert not torch.allclose(plain.head[0].weight, trained.head[0].weight, rtol=1e-3)


def test_a_chunk_as_large_as_the_batch_is_the_plain_layer() -> None:
    assert_identical(run(GhostBatchNorm(8)).state_dict(), run().state_dict())


def test_validation_uses_the_running_statistics() -> None:
    class Checks(Module):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            mine = self.body(batch)
            layer = self.body[1]
            inputs = self.body[0](batch)
            plain = nn.functional.batch_norm(
                inputs, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=layer.eps
            )
            assert torch.equal(mine, plain.relu())

    run(GhostBatchNorm(4), module=Checks())


def test_a_frozen_layer_stays_as_it_is() -> None:
    class Frozen(Module):
        def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
            self.body[1].eval()

    module = run(GhostBatchNorm(4), module=Frozen())
    assert module.body[1].num_batches_tracked == 0
    assert module.head[1].num_batches_tracked == 24, "two chunks in each of 12 batches"


def test_two_instances_divide_different_layers() -> None:
    module = run(GhostBatchNorm(4, include=["body"]), GhostBatchNorm(2, include=["head"], name="head"))
    assert module.body[1].num_batches_tracked == 24
    assert module.head[1].num_batches_tracked == 48
    assert not any("forward" in vars(child) for child in module.modules())


def test_a_size_that_divides_nothing_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "lightning.pytorch"):
        run(GhostBatchNorm(), max_epochs=1)
    assert "batches have 8 samples, no more than size=128" in caplog.text


def synchronized() -> Any:
    return nn.SyncBatchNorm.convert_sync_batchnorm(Module())


@pytest.mark.parametrize(
    ("acting", "module", "arguments", "error"),
    [
        ([GhostBatchNorm(4)], synchronized, {}, r"SyncBatchNorm \(body.1\) over all ranks"),
        (
            [GhostBatchNorm(4)],
            Module,
            {"strategy": "ddp_fork", "devices": 2, "sync_batchnorm": True},
            "SyncBatchNorm over all ranks",
        ),
        (
            [GhostBatchNorm(4, include=["boddy"])],
            Module,
            {},
            "no BatchNorm layer is named 'boddy'. Did you mean 'body.1'",
        ),
        ([GhostBatchNorm(4, include=["body"], exclude=["body"])], Module, {}, "chooses no BatchNorm layer"),
        ([GhostBatchNorm(4), GhostBatchNorm(2, name="b")], Module, {}, "would both divide the batches of 'body.1'"),
    ],
)
def test_what_it_refuses(acting: list[Any], module: Any, arguments: dict[str, Any], error: str) -> None:
    with pytest.raises(Exception, match=error):
        run(*copy.deepcopy(acting), module=module(), **arguments)


def test_a_module_without_such_layers() -> None:
    class Plain(Module):
        def __init__(self) -> None:
            super().__init__()
            self.body[1] = self.head[1] = nn.Identity()

    with pytest.raises(ValueError, match="finds no BatchNorm layer in Plain"):
        run(GhostBatchNorm(4), module=Plain())
