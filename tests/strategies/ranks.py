"""A small task for the tests of the strategies, and fits of it that tell what each rank saw."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning_utilities.core import rank_zero
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from lightning_grad.strategies import CompressedDDPStrategy, DGCStrategy
from lightning_grad.strategies._rank_saving import RankSavingDDP

BATCH, BATCHES = 12, 6  # a batch is shared out: 12, 6, 4 or 3 samples on 1, 2, 3 or 4 ranks

Result = dict[str, Any]


def small_net() -> nn.Module:
    """Return a net with matrices of 2048 and 256 entries, the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4))


def samples(seed: int = 0) -> tuple[Tensor, Tensor]:
    x = torch.randn(BATCH * BATCHES, 32, generator=torch.Generator().manual_seed(seed))
    return x, x[:, :4].argmax(1)


class Task(pl.LightningModule):
    """Classification by SGD, in which every rank takes its part of each batch.

    Args:
        net: What is trained; default :func:`small_net`.
        cycle: Whether rate and momentum follow a ``OneCycleLR``.
        options: Of the SGD.
    """

    def __init__(self, net: nn.Module | None = None, cycle: bool = False, **options: Any) -> None:
        super().__init__()
        self.net = small_net() if net is None else net
        self.cycle, self.options = cycle, {"lr": 0.1, **options}

    def loss(self, batch: Sequence[Tensor], rank: int, ranks: int) -> Tensor:
        x, y = (part.chunk(ranks)[rank] for part in batch)
        return F.cross_entropy(self.net(x), y)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor | None:
        return self.loss(batch, self.global_rank, self.trainer.world_size)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD([p for p in self.parameters() if p.requires_grad], **self.options)
        return with_schedule(optimizer) if self.cycle else optimizer


def with_schedule(optimizer: torch.optim.Optimizer) -> Any:
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": one_cycle(optimizer), "interval": "step"}}


def one_cycle(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.OneCycleLR:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=100, cycle_momentum=True)


def dgc(**changes: Any) -> DGCStrategy:
    """Return a strategy that compresses every matrix of the small net, without a warm-up."""
    return DGCStrategy(**{"ratio": 0.05, "warmup": None, "min_numel": 1, **changes})


class Recorder(pl.Callback):
    """Keeps what a rank's gradients were before the exchange and what the optimizer got, step by step."""

    def __init__(self) -> None:
        self.local: list[dict[str, Tensor]] = []
        self.mean: list[dict[str, Tensor]] = []
        self.sent: list[int] = []
        self.metrics: list[dict[str, float]] = []
        self.buckets = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        strategy = trainer.strategy
        if not isinstance(strategy, CompressedDDPStrategy):
            return
        prepare = strategy.prepare_

        def recorded(gradients: Any) -> Tensor:
            self.local.append({g.name: g.values.clone().view(g.parameter.shape) for g in gradients})
            return prepare(gradients)

        strategy.prepare_ = recorded  # type: ignore[method-assign]

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        named = pl_module.named_parameters()
        self.mean.append({name: p.grad.clone() for name, p in named if p.grad is not None})

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.metrics.append({key: float(value) for key, value in trainer.callback_metrics.items()})
        if isinstance(trainer.strategy, CompressedDDPStrategy):
            self.sent.append(trainer.strategy.ledger.step_sent)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if isinstance(trainer.strategy.model, DistributedDataParallel):
            sizes = trainer.strategy.model._get_ddp_logging_data().get("rebuilt_bucket_sizes", "")
            self.buckets = len(sizes.split(","))


def fit(
    strategy: Any,
    module: pl.LightningModule | None = None,
    callbacks: Sequence[pl.Callback] = (),
    epochs: int = 2,
    data: Any = None,
    **options: Any,
) -> Result:
    """Train on this rank, and return weights, states and records; to be called inside ``work`` of :func:`on_ranks`."""
    module = Task() if module is None else module
    recorder = Recorder()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=strategy,
        max_epochs=epochs,
        callbacks=[*callbacks, recorder],
        use_distributed_sampler=False,
        **{**quiet, "enable_model_summary": False, "log_every_n_steps": 1, **options},
    )
    trainer.fit(module, DataLoader(TensorDataset(*samples()) if data is None else data, BATCH))
    assert trainer.world_size == dist.get_world_size()
    result = {key: getattr(recorder, key) for key in ("local", "mean", "sent", "metrics", "buckets")}
    result |= {"weights": dict(module.state_dict()), "optimizer": trainer.optimizers[0].state_dict()}
    if isinstance(strategy, RankSavingDDP):
        ledger = strategy.ledger
        result |= {"memory": strategy.memory, "ledger": ledger.state_dict(), "ratio": ledger.ratio}
    return result


@contextmanager
def said() -> Iterator[list[str]]:
    """Collect what is printed and warned of inside the block, which is complete after it."""
    lines: list[str] = []

    class Keeps(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, keeps = rank_zero.log, Keeps()  # of the namespace that was imported last
    level = logger.level
    logger.addHandler(keeps)
    logger.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield lines
    finally:
        logger.removeHandler(keeps)
        logger.setLevel(level)
    lines += [str(warning.message) for warning in caught]


def assert_same(found: Any, expected: Any) -> None:
    """Raise unless two nests of dictionaries, lists, numbers and tensors are equal, bit by bit."""
    assert type(found) is type(expected), (found, expected)
    if isinstance(found, dict):
        assert found.keys() == expected.keys()
        for key in found:
            assert_same(found[key], expected[key])
    elif isinstance(found, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(found, Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    else:
        assert found == expected


def assert_close(found: Any, expected: Any, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, check_dtype=False)
