"""The memory of a step without gradients: little more than that of an evaluation. Bytes of tensors are counted."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from lightning_grad.callbacks import ZerothOrder
from lightning_grad.testing import make_trainer

WIDTH, LAYERS = 32, 6


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that operators have created and that still exist, after each operator.

    Args:
        ignored: Tensors whose storages do not count.
    """

    def __init__(self, ignored: list[Tensor]) -> None:
        super().__init__()
        self._ignored = {tensor.untyped_storage()._cdata for tensor in ignored}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._live = {key: (storage, size) for key, (storage, size) in self._live.items() if not storage.expired()}
        for storage in [leaf.untyped_storage() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]:
            if storage._cdata not in self._ignored:
                self._live.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return result


class Deep(pl.LightningModule):
    """Square layers, so each weight is as large as the others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            *(nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh()) for _ in range(LAYERS))
        )

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.net(batch) - batch).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Watch(pl.Callback):
    """Must be first, so that it sees what other callbacks do."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Tensor, *_: Any) -> None:
        self.live = LiveBytes([*pl_module.parameters(), batch])
        self.live.__enter__()

    on_validation_batch_start = on_train_batch_start

    def on_train_batch_end(self, *_: Any) -> None:
        self.live.__exit__(None, None, None)

    on_validation_batch_end = on_train_batch_end


def peak_of(run: Callable[[Any, Deep, Any], object], samples: int, *callbacks: pl.Callback) -> int:
    watch = Watch()
    trainer = make_trainer(max_epochs=1, callbacks=[watch, *callbacks])
    run(trainer, Deep(), DataLoader(list(torch.randn(2, samples, WIDTH)), batch_size=None))
    return watch.live.peak


def evaluate(trainer: Any, module: Any, data: Any) -> None:
    trainer.validate(module, data, verbose=False)


def train(trainer: Any, module: Any, data: Any) -> None:
    trainer.fit(module, data)


@pytest.mark.parametrize("samples", [1, 64])
def test_a_step_takes_the_memory_of_an_evaluation_of_two_batches_and_of_a_direction(samples: int) -> None:
    weight, batch, scalars = 4 * WIDTH * WIDTH, 4 * samples * WIDTH, 64
    evaluation = peak_of(evaluate, samples)
    bound = max(weight + batch, evaluation + 2 * batch) + scalars  # the batch is kept, and copied for the second pass
    assert evaluation <= 3 * batch
    assert evaluation < peak_of(train, samples, ZerothOrder()) <= bound
    assert peak_of(train, samples) > 2 * bound, "plain SGD stores gradients, and the inputs of all layers"
