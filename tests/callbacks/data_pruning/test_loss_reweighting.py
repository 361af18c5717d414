"""The gradient is that of the weighted losses, over one process or several, and the weights sharpen over the run."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_grad.callbacks import InfoBatch, LossReweighting
from lightning_grad.testing import assert_identical, state_of
from tests.callbacks.data_pruning.test_data_pruning import BATCH, CLASSES, WIDTH, Classifier, Manual, make_data, train

RULES = {
    "linupper": lambda h: torch.minimum(h + 1, torch.ones(())),
    "quadratic": lambda h: 1 - h**2,
    "extremes": lambda h: h.abs(),
}


def weights_by_hand(losses: Tensor, rule: str, temperature: float) -> Tensor:
    losses = losses.double()
    h = 2 * (losses - losses.min()) / (losses.max() - losses.min()) - 1
    weights = (RULES[rule](h) / temperature).exp()
    return weights / weights.sum()


class Linear(Classifier):
    """A linear model, whose gradient can be worked by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Identity(), nn.Linear(WIDTH, CLASSES)
        self.steps: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.steps.append([batch, self.head.weight.detach().clone(), self.head.bias.detach().clone(), loss.item()])
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.steps[-1].append(self.head.weight.grad.clone())


class Temperature(pl.Callback):
    """Remembers the temperature of each step."""

    def __init__(self, callback: LossReweighting) -> None:
        self.callback = callback
        self.found: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.found.append(self.callback._now)


@pytest.mark.parametrize("rule", RULES)
def test_gradient_is_that_of_the_weighted_sum(rule: Any) -> None:
    callback = LossReweighting(rule, temperature=0.5, start_temperature=0.5, warmup_fraction=0.0)
    for (x, y, _), matrix, bias, loss, gradient in train(callback, Linear()).module.steps:
        logits = x @ matrix.T + bias
        losses = logits.logsumexp(1) - logits[torch.arange(len(y)), y]
        weights = weights_by_hand(losses, rule, 0.5)
        error = (logits.softmax(1) - F.one_hot(y, CLASSES)).double()
        expected = (weights[:, None] * error).T @ x.double()
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-6)
        assert loss == pytest.approx(losses.mean().item(), rel=1e-4)  # the step's own value stays


def temperatures(**arguments: Any) -> list[float]:
    callback = LossReweighting(**arguments)
    watch = Temperature(callback)
    train(callback, dataset=make_data(40), epochs=4, more=[watch])
    return watch.found


def test_temperature_falls_over_the_run_to_its_end() -> None:
    found = temperatures(start_temperature=8.0, temperature=0.5, warmup_fraction=0.25)
    expected = []
    for step in range(1, 21):
        done = (step / 20 - 0.25) / 0.75
        expected.append(8.0 * (0.5 / 8.0) ** done if done >= 0 else math.inf)
    assert found == pytest.approx(expected)
    assert found[:4] == [math.inf] * 4
    assert found[-1] == pytest.approx(0.5)


def test_nothing_is_weighted_in_the_warmup() -> None:
    plain, warm = (
        train(callback, Linear()).module for callback in (pl.Callback(), LossReweighting(warmup_fraction=1.0))
    )
    for own, other in zip(plain.steps[:-1], warm.steps[:-1], strict=True):
        assert_identical(own, other)
    assert not torch.equal(plain.steps[-1][-1], warm.steps[-1][-1])


def test_an_infinite_temperature_turns_it_off() -> None:
    plain, off = (
        train(callback) for callback in (pl.Callback(), LossReweighting(temperature=math.inf, warmup_fraction=0.0))
    )
    assert_identical(state_of(plain.trainer, plain.module), state_of(off.trainer, off.module))


class Halves(Linear):
    """Each rank takes its part of the batch."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [part.chunk(self.trainer.world_size)[self.global_rank] for part in batch]


class Write(pl.Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        gradients = [step[-1].tolist() for step in pl_module.steps]
        (self.folder / f"{trainer.world_size}-{trainer.global_rank}.json").write_text(json.dumps(gradients))


def test_two_ranks_weigh_the_samples_of_both(tmp_path: Path) -> None:
    for arguments in ({}, {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False}):
        callback = LossReweighting(temperature=0.5, start_temperature=1.0, warmup_fraction=0.0)
        loader = DataLoader(make_data(20), BATCH)
        train(callback, Halves(), loader=loader, more=[Write(tmp_path)], **arguments)
    alone, first, second = (
        torch.tensor(json.loads((tmp_path / f"{name}.json").read_text())) for name in ("1-0", "2-0", "2-1")
    )
    assert torch.equal(first, second)
    torch.testing.assert_close(first, alone, rtol=1e-4, atol=1e-6)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(make_data(40))


def test_iterable_data_with_so_many_steps() -> None:
    callback = LossReweighting(warmup_fraction=0.2)
    watch = Temperature(callback)
    run = train(callback, loader=DataLoader(Stream(), BATCH), epochs=-1, max_steps=10, more=[watch])
    assert run.trainer.global_step == 10
    assert watch.found[0] == math.inf
    assert watch.found[2:] == sorted(watch.found[2:], reverse=True)
    assert watch.found[2] == pytest.approx(10.0)
    assert 1.0 < watch.found[-1] < 2.0


def test_a_run_without_known_end_is_refused() -> None:
    with pytest.raises(ValueError, match=r"LossReweighting needs the length of the run.*max_steps"):
        train(LossReweighting(), loader=DataLoader(Stream(), BATCH), epochs=1)
    train(LossReweighting(temperature=math.inf), loader=DataLoader(Stream(), BATCH), epochs=1)


def test_a_sample_without_valid_positions_harms_nobody() -> None:
    class Tokens(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Embedding(7, 5), nn.Linear(5, 7)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            return F.cross_entropy(self(x).flatten(0, 1), y.flatten())

    generator = torch.Generator().manual_seed(0)
    x = torch.randint(7, (12, 4), generator=generator)
    y = x.roll(1, 1)
    y[3] = -100
    run = train(LossReweighting(warmup_fraction=0.0), Tokens(), TensorDataset(x, y))
    assert all(parameter.isfinite().all() for parameter in run.module.parameters())


def test_logs(tmp_path: Path) -> None:
    callback, module = LossReweighting(temperature=0.5, start_temperature=0.5, warmup_fraction=0.0), Linear()
    run = train(callback, module, logger=CSVLogger(tmp_path), log_every_n_steps=2)
    ours = {"data/temperature", "data/effective_samples", "data/loss", "data/weighted_loss"}
    assert set(run.trainer.callback_metrics) == {"loss", *ours}
    (x, y, _), matrix, bias = module.steps[-1][:3]
    losses = F.cross_entropy(x @ matrix.T + bias, y, reduction="none")
    weights = weights_by_hand(losses, "linupper", 0.5)
    assert run.trainer.callback_metrics["data/temperature"] == 0.5
    effective = 1 / (weights.square().sum() * len(y))
    torch.testing.assert_close(run.trainer.callback_metrics["data/effective_samples"].double(), effective)
    logged = [run.trainer.callback_metrics[f"data/{name}"].double() for name in ("loss", "weighted_loss")]
    torch.testing.assert_close(logged, [losses.double().mean(), (weights * losses).sum()], rtol=1e-5, atol=1e-6)
    with Path(run.trainer.logger.log_dir, "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["data/temperature"]]
    assert [row["step"] for row in rows] == ["1", "3", "5"]


def test_a_second_that_weighs_and_manual_optimization_are_refused() -> None:
    with pytest.raises(ValueError, match="LossReweighting and InfoBatch would both weight"):
        train(LossReweighting(), more=[InfoBatch()])
    with pytest.raises(ValueError, match="LossReweighting does not work with manual optimization"):
        train(LossReweighting(), Manual())
