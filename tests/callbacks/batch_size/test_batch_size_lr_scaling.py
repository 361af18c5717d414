"""BatchSizeLRScaling: rates, schedules, changes during the run, resuming with another batch size, and refusals."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, LearningRateFinder
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from lightning_grad.callbacks import BatchSizeLRScaling, OptimizerSwap
from lightning_grad.testing import assert_identical, make_trainer, on_ranks

DATA = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]


class Module(pl.LightningModule):
    """Keeps the rate of each step."""

    def __init__(self, kind: Any = torch.optim.SGD, lr: float = 0.01, schedule: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.kind, self.lr, self.schedule = nn.Linear(4, 1), kind, lr, schedule
        self.rates: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).square().mean()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.rates.append(float(optimizer.param_groups[0]["lr"]))

    def configure_optimizers(self) -> Any:
        optimizer = self.kind(self.parameters(), lr=self.lr)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)] if self.schedule else []


def run(
    *acting: Any, module: Any = None, loader: Any = None, batch: int = 8, ckpt: Any = None, **arguments: Any
) -> Any:
    module = Module() if module is None else module
    trainer = make_trainer(callbacks=list(acting), **{"max_epochs": 2, **arguments})
    trainer.fit(module, DataLoader(DATA, batch) if loader is None else loader, ckpt_path=ckpt)
    return trainer, module


@pytest.mark.parametrize(("batch", "accumulated", "linear"), [(8, 1, 1.0), (16, 1, 2.0), (8, 2, 2.0), (8, 4, 4.0)])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_rates_and_schedules(batch: int, accumulated: int, linear: float, kind: Any) -> None:
    factor = linear if kind is torch.optim.SGD else linear**0.5
    scaling = BatchSizeLRScaling(8)
    trainer, module = run(scaling, module=Module(kind), batch=batch, accumulate_grad_batches=accumulated)
    by_hand = run(module=Module(kind, 0.01 * factor), batch=batch, accumulate_grad_batches=accumulated)[1]
    assert module.rates == pytest.approx(by_hand.rates)
    assert set(module.rates) == {0.01 * factor, 0.005 * factor}
    assert trainer.lr_scheduler_configs[0].scheduler.base_lrs == [0.01 * factor]
    for left, right in zip(module.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(left, right)


def test_the_base_size_changes_nothing() -> None:
    assert_identical(run(BatchSizeLRScaling(8))[1].state_dict(), run()[1].state_dict())


def test_rules_may_be_set() -> None:
    assert run(BatchSizeLRScaling(2, "sqrt"))[1].rates[0] == pytest.approx(0.02)
    assert run(BatchSizeLRScaling(2, "linear"), module=Module(torch.optim.Adam))[1].rates[0] == pytest.approx(0.04)
    assert run(BatchSizeLRScaling(2, "sqrt"), module=Module(torch.optim.Rprop))[1].rates[0] == pytest.approx(0.02)


def test_it_follows_a_table_of_accumulation() -> None:
    table = GradientAccumulationScheduler({0: 1, 1: 4})
    for acting in ([BatchSizeLRScaling(8), table], [table, BatchSizeLRScaling(8)]):
        _, module = run(*acting, module=Module(schedule=False))
        assert module.rates == pytest.approx([0.01] * 8 + [0.04] * 2)


def test_it_follows_a_loader_of_another_size() -> None:
    class Grows(Module):
        def train_dataloader(self) -> Any:
            return DataLoader(DATA, 8 if self.current_epoch == 0 else 32)

    module = Grows(schedule=False)
    make_trainer(callbacks=[BatchSizeLRScaling(8)], max_epochs=2, reload_dataloaders_every_n_epochs=1).fit(module)
    assert module.rates == pytest.approx([0.01] * 8 + [0.04] * 2)


def test_a_resumed_run_multiplies_by_the_ratio_only(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    trainer, _ = run(BatchSizeLRScaling(8), batch=16, max_epochs=1)
    trainer.save_checkpoint(path)
    _, same = run(BatchSizeLRScaling(8), batch=16, ckpt=path)
    assert same.rates == pytest.approx([0.01] * 4)  # twice 0.01, halved by the schedule
    trainer, larger = run(BatchSizeLRScaling(8), batch=32, ckpt=path)
    assert larger.rates == pytest.approx([0.02] * 2)
    assert trainer.lr_scheduler_configs[0].scheduler.base_lrs == pytest.approx([0.04])
    _, other = run(BatchSizeLRScaling(16), batch=32, ckpt=path)
    assert other.rates == pytest.approx([0.01] * 2)

    class Naive(BatchSizeLRScaling):
        def restore(self, state: Any) -> None:
            """Forget the factor."""

    assert run(Naive(8), batch=32, ckpt=path)[1].rates == pytest.approx([0.04] * 2), "multiplies again"


def ranks() -> list[float]:
    _, module = run(BatchSizeLRScaling(8), strategy="ddp", devices=2, max_epochs=1)
    return module.rates[:1]


def test_ranks_count() -> None:
    assert on_ranks(2, ranks) == [pytest.approx([0.02])] * 2


def test_it_logs_the_factor() -> None:
    trainer, _ = run(BatchSizeLRScaling(2), log_every_n_steps=1)
    assert trainer.callback_metrics["batch_size/lr_factor"] == 4
    assert trainer.callback_metrics["batch_size/samples"] == 8


class Batches(IterableDataset[Tensor]):
    def __iter__(self) -> Any:
        return iter(DATA.split(8))


class Indices:
    """A batch sampler of another class."""

    def __iter__(self) -> Any:
        return iter(torch.arange(64).split(8))

    def __len__(self) -> int:
        return 8


@pytest.mark.parametrize(
    ("loader", "says"),
    [
        (lambda: DataLoader(DATA, batch_sampler=BatchSampler(SequentialSampler(range(64)), 8, False)), True),
        (lambda: DataLoader(DATA, 8, drop_last=True), True),
        (lambda: DataLoader(Batches(), batch_size=None), False),
        (lambda: DataLoader(DATA, batch_sampler=Indices()), False),
        (Batches, False),
    ],
    ids=["batch sampler", "drop_last", "iterable", "own batch sampler", "no DataLoader"],
)
def test_loaders(loader: Any, says: bool) -> None:
    if says:
        assert run(BatchSizeLRScaling(4), loader=loader())[1].rates[0] == pytest.approx(0.02)
    else:
        with pytest.raises(ValueError, match=r"must know how many samples a batch has.*Set batch_size"):
            run(BatchSizeLRScaling(4), loader=loader())
    assert run(BatchSizeLRScaling(4, batch_size=16), loader=loader())[1].rates[0] == pytest.approx(0.04)


@pytest.mark.parametrize(
    ("acting", "kind", "error"),
    [
        ([BatchSizeLRScaling(8)], torch.optim.Rprop, "knows no rule for Rprop. Set rule='linear'"),
        (
            [BatchSizeLRScaling(8), LearningRateFinder()],
            torch.optim.SGD,
            "LearningRateFinder finds the rate for the batch",
        ),
        ([BatchSizeLRScaling(8), BatchSizeLRScaling(8, name="b")], torch.optim.SGD, "Use only one BatchSizeLRScaling"),
    ],
)
def test_what_it_refuses(acting: list[Any], kind: Any, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        run(*acting, module=Module(kind))


def test_parts_of_one_optimizer_need_one_rule() -> None:
    class Deep(Module):
        def __init__(self, kind: Any) -> None:
            super().__init__(kind, schedule=False)
            self.net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 1))  # type: ignore[assignment]

    def swap() -> Any:
        return OptimizerSwap("galore-adamw", options={"rank": 2}, lr_factor=1.0)

    assert run(swap(), BatchSizeLRScaling(2), module=Deep(torch.optim.AdamW))[1].rates[0] == pytest.approx(0.02)
    with pytest.raises(ValueError, match="two rules for the parts of one optimizer"):
        run(swap(), BatchSizeLRScaling(2), module=Deep(torch.optim.SGD))
