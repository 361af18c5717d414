"""The forecast of a planted run is right and comes only when it can be trusted, under every kind of scheduler."""

import math
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

from lightning_grad.callbacks import AnnealingLaw
from lightning_grad.functional import AnnealingConstants
from lightning_grad.testing import make_trainer

EPOCHS, BATCHES = 4, 60
STEPS, DECAY = EPOCHS * BATCHES, 0.95
LAW = AnnealingConstants(floor=2.0, scale=0.4, alpha=0.5, annealing=0.05, decay=DECAY)


def cosine(step: int) -> float:
    return min(1.0, (step + 1) / 10) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / STEPS)))


SCHEDULES = {
    "lambda": lambda o: (lr_scheduler.LambdaLR(o, cosine), "step", 1),
    "one cycle": lambda o: (lr_scheduler.OneCycleLR(o, 1.0, STEPS), "step", 1),
    "cosine of epochs": lambda o: (lr_scheduler.CosineAnnealingLR(o, EPOCHS), "epoch", 1),
    "sequence": lambda o: (
        lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 10), lr_scheduler.ExponentialLR(o, 0.99)], milestones=[10]
        ),
        "step",
        1,
    ),
    "every second step": lambda o: (lr_scheduler.ExponentialLR(o, 0.98), "step", 2),
    "plateau": lambda o: (lr_scheduler.ReduceLROnPlateau(o), "epoch", 1),
}


class Planted(pl.LightningModule):
    """Returns the losses of a law at its own learning rates."""

    def __init__(self, schedule: str = "lambda", law: AnnealingConstants = LAW) -> None:
        super().__init__()
        self.weight, self.schedule, self.law = nn.Parameter(torch.zeros(())), schedule, law
        self.rates: list[float] = []
        self.sums = [0.0, 0.0, 0.0]  # S1, S2 and the momentum

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        rate, before = self.optimizers().param_groups[0]["lr"], self.rates
        fall = before[-1] - rate if before and rate < max(before) else 0.0
        momentum = DECAY * self.sums[2] + fall
        self.sums = [self.sums[0] + rate, self.sums[1] + momentum, momentum]
        self.rates.append(rate)
        loss = self.law.floor + self.law.scale * self.sums[0] ** -self.law.alpha - self.law.annealing * self.sums[1]
        return self.weight * 0 + loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD([self.weight], lr=1.0, momentum=0.9)
        scheduler, interval, frequency = SCHEDULES[self.schedule](optimizer)
        config = {
            "scheduler": scheduler,
            "interval": interval,
            "frequency": frequency,
            "monitor": "loss",
            "strict": False,
        }
        return {"optimizer": optimizer, "lr_scheduler": config}


def fit(callback: AnnealingLaw, module: Any, *others: pl.Callback, **arguments: Any) -> pl.Trainer:
    settings = {"max_epochs": EPOCHS, "log_every_n_steps": 60, **arguments}
    trainer = make_trainer(callbacks=[callback, *others], **settings)
    trainer.fit(module, DataLoader(torch.zeros(BATCHES, 1), 1))
    return trainer


class Plans(AnnealingLaw):
    """Remembers the learning rates that it expects."""

    def _rest(self, *args: Any) -> Any:
        rest, problem = super()._rest(*args)
        self.expected = [*self.curve[0], *rest]
        return rest, problem


@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name != "plateau"])
def test_it_knows_the_rates_of_the_rest_of_the_run(schedule: str) -> None:
    callback, module = Plans(DECAY, refits=0), Planted(schedule)
    fit(callback, module)
    assert len({round(rate, 6) for rate in module.rates}) > 2
    assert callback.curve[0] == module.rates
    plain = Planted(schedule)
    make_trainer(max_epochs=EPOCHS).fit(plain, DataLoader(torch.zeros(BATCHES, 1), 1))
    assert plain.rates == module.rates  # the schedulers of the run are left alone
    begins = [row["steps"] for row in callback.record.rows()]
    assert begins[0] == 60
    assert callback.expected == pytest.approx(module.rates)


def test_the_forecast_of_a_planted_run(tmp_path: Any, capsys: Any) -> None:
    callback, module = AnnealingLaw(DECAY, refits=0), Planted()
    trainer = fit(callback, module, logger=CSVLogger(tmp_path))
    final = float(module.law.losses(module.rates)[-1])
    trusted = [row for row in callback.record.rows() if not row["problem"]]
    assert trusted[0]["steps"] <= 0.7 * STEPS
    assert all(row["final_loss"] == pytest.approx(final, rel=0.02) for row in trusted)
    assert float(trainer.callback_metrics["annealing_law/final_loss"]) == pytest.approx(trusted[-1]["final_loss"])
    assert float(trainer.callback_metrics["annealing_law/band"]) < 0.05
    assert sorted(path.name for path in tmp_path.rglob("annealing_law.*")) == ["annealing_law.csv", "annealing_law.png"]
    naive = callback.curve[1][trusted[0]["steps"] - 1]  # the loss at that step
    assert abs(naive / final - 1) > 0.02


@pytest.mark.filterwarnings("ignore:ReduceLROnPlateau conditioned on metric loss:RuntimeWarning")
@pytest.mark.parametrize(
    ("callback", "module", "words"),
    [
        (AnnealingLaw(), Planted(), "The run ended before step 3000"),
        (AnnealingLaw(DECAY, refits=0), Planted("plateau"), "A scheduler follows a metric"),
        (
            AnnealingLaw(DECAY, refits=0),
            Planted(law=AnnealingConstants(-3.0, 2.0, 0.5, 0.0)),
            "The law needs losses above 0",
        ),
        (AnnealingLaw(DECAY, refits=0, max_band=1e-9), Planted(), "Refits differ by"),
    ],
)
def test_it_is_silent_and_says_why(callback: AnnealingLaw, module: Planted, words: str, monkeypatch: Any) -> None:
    said: list[str] = []
    monkeypatch.setattr(AnnealingLaw, "say", lambda self, what: said.append(what))
    trainer = fit(callback, module)
    assert "annealing_law/final_loss" not in trainer.callback_metrics
    assert said[-1].startswith("made no forecast that can be trusted. ")
    assert words in said[-1]


class Halve(pl.Callback):
    """Changes the learning rate behind the scheduler's back."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        trainer.optimizers[0].param_groups[0]["lr"] *= 0.5


def test_rates_that_do_not_follow_the_schedulers() -> None:
    callback = AnnealingLaw(DECAY, refits=0)
    fit(callback, Planted(), Halve())
    problems = [row["problem"] for row in callback.record.rows()]
    assert all("did not follow" in problem for problem in problems[1:])


def test_accumulated_batches_are_one_step() -> None:
    callback, module = AnnealingLaw(DECAY, refits=0), Planted()
    losses = []
    step = module.training_step
    module.training_step = lambda batch, batch_idx: losses.append(step(batch, batch_idx)) or losses[-1]
    fit(callback, module, accumulate_grad_batches=2)
    assert callback.curve[0] == module.rates[::2]
    means = [(a + b).item() / 2 for a, b in zip(losses[::2], losses[1::2], strict=True)]
    assert callback.curve[1] == pytest.approx(means, rel=1e-6)


def test_a_run_that_ends_within_an_epoch_keeps_its_last_losses() -> None:
    callback, module = AnnealingLaw(DECAY, refits=0), Planted()
    fit(callback, module, max_steps=7)
    assert callback.curve[0] == module.rates
    assert len(callback.curve[1]) == 7


def test_a_module_that_steps_its_schedulers_itself() -> None:
    class Own(Planted):
        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            scheduler.step()

    callback = AnnealingLaw(DECAY, refits=0)
    fit(callback, Own())
    assert all("steps its schedulers itself" in row["problem"] for row in callback.record.rows())
