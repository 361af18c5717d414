"""Learning-rate schedules that were made for the whole training set, in epochs that are shorter or longer."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import lr_scheduler as schedules

from lightning_grad.callbacks import DataPruning, RepeatedRandomSubset
from lightning_grad.core.samples.schedule_warp import count_steps, steps_due
from lightning_grad.testing import ResumableLoader, make_trainer
from tests.core.test_training_set import HALF, TOTAL, Choose, Net, fit, loader

# SequentialLR itself gives it before torch 2.9.
pytestmark = pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")

EPOCHS, BATCHES, RATE, LEAST = 4, 10, 0.1, 1e-4

KINDS: dict[str, Callable[[Any, int], Any]] = {
    "cosine": lambda optimizer, steps: schedules.CosineAnnealingLR(optimizer, steps, eta_min=LEAST),
    "one-cycle": lambda optimizer, steps: schedules.OneCycleLR(optimizer, RATE, total_steps=steps + 1),
    "lambda": lambda optimizer, steps: schedules.LambdaLR(optimizer, lambda step: 1 - step / steps),
    "warm-up": lambda optimizer, steps: schedules.SequentialLR(
        optimizer,
        [
            schedules.LinearLR(optimizer, 0.1, total_iters=max(1, steps // 4)),
            schedules.CosineAnnealingLR(optimizer, steps - max(1, steps // 4)),
        ],
        [max(1, steps // 4)],
    ),
}
ENDS = {"cosine": LEAST, "one-cycle": RATE / 25 / 1e4, "lambda": 0.0, "warm-up": 0.0}


class Rates(pl.Callback):
    """Notes the rate behind every step of the optimizer, and the one at each epoch's end."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.epochs: list[float] = []
        self._last = -1

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step != self._last:
            self.steps.append(trainer.optimizers[0].param_groups[0]["lr"])
        self._last = trainer.global_step

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.epochs.append(trainer.optimizers[0].param_groups[0]["lr"])


def scheduled(kind: str, interval: str = "step", frequency: int = 1, accumulate: int = 1, base: Any = Net) -> Any:
    """A module whose schedule is made for exactly the steps of the whole run."""

    def configure(net: Any, optimizer: Any) -> Any:
        optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
        steps = EPOCHS * count_steps(BATCHES, BATCHES, accumulate, frequency) if interval == "step" else EPOCHS
        chosen = {"scheduler": KINDS[kind](optimizer, steps), "interval": interval, "frequency": frequency}
        return {"optimizer": optimizer, "lr_scheduler": chosen}

    return base(configure)


def run(callback: Any, net: Any, tmp_path: Any, train: Any = None, **arguments: Any) -> Rates:
    rates = Rates()
    callbacks = [rates] if callback is None else [callback, rates]
    fit(callbacks, train, net, **{"max_epochs": EPOCHS, "default_root_dir": tmp_path, **arguments})
    return rates


def half_from_two() -> Choose:
    return Choose(lambda epoch: HALF if epoch >= 2 else None)


def only_random(budget: Any) -> DataPruning:
    return DataPruning(0.5, epoch=2, keep="random", budget=budget, num_shown=0, figure=False)


TECHNIQUES: dict[str, Callable[[], Any]] = {
    "epochs": lambda: only_random("epochs"),
    "steps": lambda: only_random("steps"),
    "from the start": lambda: RepeatedRandomSubset(0.5),
}


def falls(rates: list[float]) -> bool:
    return all(after <= before + 1e-12 for before, after in pairwise(rates))


CASES = [
    ("step", 1, 1),
    ("step", 1, 3),
    ("step", 2, 1),
    ("step", 2, 3),
    ("epoch", 1, 1),
    ("epoch", 1, 3),
]


@pytest.mark.filterwarnings("ignore:A `OneCycleLR` scheduler is using 'interval'")
@pytest.mark.parametrize(
    ("technique", "kind"),
    [*(("epochs", kind) for kind in KINDS), ("steps", "one-cycle"), ("from the start", "cosine")],
)
@pytest.mark.parametrize(("interval", "frequency", "accumulate"), CASES)
def test_every_epoch_ends_at_the_rate_of_the_whole_run(
    interval: str, frequency: int, accumulate: int, kind: str, technique: str, tmp_path: Any
) -> None:
    settings = (interval, frequency, accumulate)
    whole = run(None, scheduled(kind, *settings), tmp_path, accumulate_grad_batches=accumulate)
    pruned = run(TECHNIQUES[technique](), scheduled(kind, *settings), tmp_path, accumulate_grad_batches=accumulate)
    assert whole.epochs[-1] == pytest.approx(ENDS[kind], abs=1e-12), "the run without pruning ends where it should"
    assert pruned.epochs == pytest.approx(whole.epochs, rel=1e-9, abs=1e-12)
    if technique == "steps":
        assert pruned.steps == whole.steps
    else:
        assert len(pruned.steps) < len(whole.steps)
    peak = pruned.steps.index(max(pruned.steps))
    assert falls(pruned.steps[peak:])
    assert falls(pruned.steps[: peak + 1][::-1])
    assert peak == 0 or kind in ("one-cycle", "warm-up")


def test_without_treatment_the_schedule_would_not_end(tmp_path: Any, monkeypatch: Any) -> None:
    """The premise."""
    from lightning_grad.core import subset

    monkeypatch.setattr(subset, "warp_schedules", lambda *_: lambda: None)
    assert run(half_from_two(), scheduled("cosine"), tmp_path).epochs[-1] > 0.1 * RATE


def test_rates_within_an_epoch_follow_its_share(tmp_path: Any) -> None:
    """With half the batches, each step takes the schedule two steps on."""
    whole = run(None, scheduled("lambda"), tmp_path)
    pruned = run(half_from_two(), scheduled("lambda"), tmp_path)
    assert pruned.steps == pytest.approx(whole.steps[:20] + whole.steps[21::2], abs=1e-12)


@pytest.mark.parametrize(
    ("kind", "kept"),
    [
        ("lambda", 3),
        ("one-cycle", 9),
        ("cosine", 13),
        ("one-cycle", 27),
        ("one-cycle", 41),
        ("lambda", 60),
        ("cosine", 81),
    ],
)
def test_any_number_of_batches_ends_at_the_end(kind: str, kept: int, tmp_path: Any) -> None:
    plan = Choose(lambda epoch: torch.arange(kept) % TOTAL if epoch else None)
    pruned = run(plan, scheduled(kind), tmp_path)
    assert pruned.epochs[-1] == pytest.approx(ENDS[kind], abs=1e-12)
    assert len(pruned.steps) == 10 + 3 * -(-kept // 4)


def test_longer_epochs_slow_the_schedule_down(tmp_path: Any) -> None:
    twice = Choose(lambda epoch: torch.cat([torch.arange(TOTAL)] * 2) if epoch else None)
    whole = run(None, scheduled("lambda"), tmp_path)
    longer = run(twice, scheduled("lambda"), tmp_path)
    assert len(longer.steps) == 10 + 3 * 20
    assert longer.epochs == pytest.approx(whole.epochs, abs=1e-12)
    assert falls(longer.steps)
    assert len(set(longer.steps)) == 40, "every rate of the schedule, most of them for two steps"


def test_a_limit_of_batches_shortens_the_whole_run_too(tmp_path: Any) -> None:
    def configure(net: Any, optimizer: Any) -> Any:
        steps = net.trainer.estimated_stepping_batches
        assert steps == EPOCHS * 8
        return [optimizer], [{"scheduler": KINDS["cosine"](optimizer, steps), "interval": "step"}]

    pruned = run(half_from_two(), Net(configure), tmp_path, limit_train_batches=0.8)
    assert len(pruned.steps) == 8 + 8 + 4 + 4
    assert pruned.epochs[-1] == pytest.approx(LEAST)


@pytest.mark.parametrize("kind", ["one-cycle", "cosine"])
@pytest.mark.parametrize("epochs", [-1, 3, 9])
def test_where_max_steps_ends_the_run_schedules_count_steps(kind: str, epochs: int, tmp_path: Any) -> None:
    def configure(net: Any, optimizer: Any) -> Any:
        steps = net.trainer.estimated_stepping_batches
        assert steps == 24
        return [optimizer], [{"scheduler": KINDS[kind](optimizer, steps), "interval": "step"}]

    pruned = run(half_from_two(), Net(configure), tmp_path, max_epochs=epochs, max_steps=24)
    assert len(pruned.steps) == 24
    assert pruned.steps[-1] == pytest.approx({"one-cycle": ENDS[kind], "cosine": LEAST}[kind], abs=1e-9)


def test_a_one_cycle_of_lightnings_own_estimate_is_never_stepped_too_often(tmp_path: Any) -> None:
    def configure(net: Any, optimizer: Any) -> Any:
        chosen = schedules.OneCycleLR(optimizer, RATE, total_steps=int(net.trainer.estimated_stepping_batches))
        return [optimizer], [{"scheduler": chosen, "interval": "step"}]

    for accumulate in (1, 3):
        rates = run(RepeatedRandomSubset(0.3), Net(configure), tmp_path, accumulate_grad_batches=accumulate)
        whole = run(None, Net(configure), tmp_path, accumulate_grad_batches=accumulate)
        assert rates.epochs == pytest.approx(whole.epochs, abs=1e-12)


class Plateau(schedules.ReduceLROnPlateau):
    calls = 0

    def step(self, *arguments: Any, **keywords: Any) -> None:
        self.calls += 1
        super().step(*arguments, **keywords)


@pytest.mark.parametrize(("interval", "calls"), [("step", 10 + 10 + 5 + 5), ("epoch", 4)])
def test_a_schedule_that_follows_a_metric_is_left_alone(interval: str, calls: int, tmp_path: Any) -> None:
    class Logging(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("flat", 1.0)
            return super().training_step(batch, batch_idx)

    made: list[Plateau] = []

    def configure(net: Any, optimizer: Any) -> Any:
        made.append(Plateau(optimizer, patience=1000))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": made[-1], "interval": interval, "monitor": "flat"},
        }

    run(half_from_two(), Logging(configure), tmp_path)
    assert made[-1].calls == calls


class Stepping(Net):
    """Steps its schedulers in a hook of its own."""

    stepped = 0

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        self.stepped += 1
        scheduler.step()


def test_a_module_with_its_own_way_to_step_is_asked_as_often(tmp_path: Any) -> None:
    net = scheduled("cosine", base=Stepping)
    rates = run(half_from_two(), net, tmp_path)
    assert net.stepped == EPOCHS * BATCHES
    assert rates.epochs[-1] == pytest.approx(LEAST)
    assert "lr_scheduler_step" not in net.__dict__
    assert "update_lr_schedulers" not in net.trainer.fit_loop.epoch_loop.__dict__
    again = scheduled("cosine", base=Stepping)
    run(None, again, tmp_path)
    assert again.stepped == EPOCHS * BATCHES


def test_several_schedules_are_each_counted_by_their_own_kind(tmp_path: Any) -> None:
    def configure(net: Any, optimizer: Any) -> Any:
        by_step = {"scheduler": KINDS["cosine"](optimizer, EPOCHS * BATCHES), "interval": "step"}
        by_epoch = {"scheduler": schedules.StepLR(optimizer, 1, gamma=1.0), "interval": "epoch"}
        return [optimizer], [by_step, by_epoch]

    rates = Rates()
    trainer, _ = fit([half_from_two(), rates], net=Net(configure), max_epochs=EPOCHS)
    by_step, by_epoch = (config.scheduler for config in trainer.lr_scheduler_configs)
    assert (by_step.last_epoch, by_epoch.last_epoch) == (EPOCHS * BATCHES, EPOCHS)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("frequency", [1, 2])
def test_resuming_anywhere_gives_the_same_rates(frequency: int, tmp_path: Any) -> None:
    def train() -> Any:
        return loader(kind=ResumableLoader, shuffle=False)

    def choose() -> Choose:
        return Choose(lambda epoch: torch.arange(22) if epoch else None)

    whole, saving = Rates(), ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=3)
    net = scheduled("cosine", frequency=frequency)
    fit([choose(), whole, saving], train(), net, max_epochs=EPOCHS, enable_checkpointing=True)
    assert len(whole.steps) == 28
    assert whole.steps[-1] == pytest.approx(LEAST)
    paths = list(tmp_path.glob("*.ckpt"))
    assert len(paths) == 9
    for path in paths:
        rest = Rates()
        trainer = make_trainer(callbacks=[choose(), rest], max_epochs=EPOCHS)
        trainer.fit(scheduled("cosine", frequency=frequency), train(), ckpt_path=path)
        done = torch.load(path, weights_only=True)["global_step"]
        assert rest.steps == whole.steps[done:], path.name


def test_manual_optimization_is_told_that_its_schedules_are_its_own(tmp_path: Any) -> None:
    class Manual(Net):
        def __init__(self, configure: Any) -> None:
            super().__init__(configure)
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.optimizers().step()
            self.lr_schedulers().step()

    net = scheduled("cosine", base=Manual)
    with pytest.warns(
        UserWarning, match="This module steps its own schedulers. If one counts batches, it will not reach its end"
    ):
        run(half_from_two(), net, tmp_path)


# The counting itself.


@pytest.mark.parametrize("full", [0, 1, 7, 10, 100])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50, 333])
def test_the_steps_of_an_epoch_add_up_and_are_spread(steps: int, full: int) -> None:
    due = [steps_due(done, steps, full) for done in range(1, steps + 1)]
    assert sum(due) == full
    assert max(due) - min(due) <= 2
    for done in range(1, steps + 1):
        assert abs(sum(due[:done]) - done * full / steps) <= 0.5


@pytest.mark.parametrize("batches", [5, 6])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("frequency", [1, 2])
def test_counted_steps_are_those_of_lightning(batches: int, accumulate: int, frequency: int) -> None:
    net = scheduled("lambda", frequency=frequency, base=Stepping)
    trainer = make_trainer(max_epochs=1, accumulate_grad_batches=accumulate)
    trainer.fit(net, loader(4 * batches))
    assert net.stepped == count_steps(batches, batches, accumulate, frequency)
