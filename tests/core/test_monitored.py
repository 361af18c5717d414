"""MonitoredCallback: one method gets each new value; the same on all ranks, resumed exactly, and refused where none comes."""

import math
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_grad.core import MonitoredCallback, until_next_fit
from lightning_grad.testing import assert_identical
from tests.callbacks.schedules.dictated import BATCHES, Dictated, Rates, data, train

VALUES = [0.1, 0.5, 0.3, 0.35, 0.5, 0.45]
EPOCHS = len(VALUES)
pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:It is recommended to use `self.log"),
]


class Notes(MonitoredCallback):
    """The least that there can be: it notes what it gets."""

    namespace: ClassVar[str] = "notes"
    nothing_done: ClassVar[str] = "nothing was noted"

    values = until_next_fit.of(list[tuple[float, float]])

    def observe(self, trainer: pl.Trainer, value: float) -> None:
        self.values.append((self.epochs_done(trainer), value))


class SlowDown(MonitoredCallback):
    """Accumulates twice as many batches from then on when the metric is worse than the best until now."""

    namespace: ClassVar[str] = "slow"

    _best = until_next_fit[float | None](lambda _: None)
    _count = until_next_fit[int](lambda _: 1)

    def __init__(self, monitor: str = "val_acc", mode: Any = "max", interval: Any = "epoch", name: Any = None) -> None:
        super().__init__(monitor, mode, interval, name)

    def observe(self, trainer: pl.Trainer, value: float) -> None:
        if self._best is None or self.is_reached(value, self._best):
            self._best = value
        else:
            self._count *= 2
            trainer.accumulate_grad_batches = self._count

    def restart(self) -> str:
        self._best = None
        return f"it goes on with {self._count} batches a step"

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        trainer.accumulate_grad_batches = self._count

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "best": self._best, "count": self._count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if self.fitting:
            self._best, self._count = state_dict["best"], state_dict["count"]


class Steps(pl.Callback):
    """Notes the optimizer steps at the end of each batch."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.seen.append((trainer.current_epoch, trainer.global_step))


def fit(*callbacks: Any, values: Any = VALUES, module: Any = None, **arguments: Any) -> Any:
    return train(list(callbacks), Dictated(values) if module is None else module, **{"max_epochs": EPOCHS, **arguments})


# What is a value.


@pytest.mark.parametrize("interval", ["validation", "epoch"])
def test_each_new_value_comes_once(interval: Any) -> None:
    callback = Notes("val_acc", interval=interval)
    fit(callback)
    assert [epoch for epoch, _ in callback.values] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert [value for _, value in callback.values] == pytest.approx(VALUES)
    assert callback.observed == EPOCHS


def test_within_an_epoch() -> None:
    by_validation, by_epoch = Notes("val_acc"), Notes("val_acc", interval="epoch", name="b")
    fit(by_validation, by_epoch, module=Dictated(VALUES, every=2), val_check_interval=2, max_epochs=3)
    assert by_validation.values == [(n / 2, pytest.approx(v)) for n, v in enumerate(VALUES, 1)]
    assert by_epoch.values == [(n, pytest.approx(v)) for n, v in enumerate(VALUES[1::2], 1)]


def test_stale_and_non_finite_values_are_ignored() -> None:
    callback = Notes("val_acc")
    with pytest.warns(UserWarning, match="Notes: val_acc is nan; non-finite values are ignored"):
        fit(callback, values=[0.1, None, math.nan, 0.3, math.inf, 0.2])
    assert [value for _, value in callback.values] == pytest.approx([0.1, 0.3, 0.2])


@pytest.mark.parametrize(("mode", "reached"), [("max", [True, True, False]), ("min", [False, True, True])])
def test_the_direction(mode: Any, reached: list[bool]) -> None:
    callback = Notes("val_acc", mode)
    assert [callback.is_reached(value, 0.5) for value in (0.6, 0.5, 0.4)] == reached


# What cannot work.


@pytest.mark.parametrize("interval", ["validation", "epoch"])
def test_a_missing_metric_is_refused_with_names_that_are_near(interval: Any) -> None:
    rates = Rates()
    error = ValueError if interval == "validation" else RuntimeError
    with pytest.raises(error, match=r"monitor='val_ac' is not logged. .*Did you mean 'val_acc'"):
        fit(Notes("val_ac", interval=interval), rates)
    assert len(rates.seen) == (0 if interval == "validation" else BATCHES), "before the first batch, or when it is due"


def test_without_validation_or_logging_nothing_starts() -> None:
    with pytest.raises(ValueError, match="Notes observes 'val_acc' at validations, and this fit has none"):
        fit(Notes("val_acc"), limit_val_batches=0)
    with pytest.raises(ValueError, match=r"Trainer\(barebones=True\) turns logging off"):
        pl.Trainer(accelerator="cpu", max_epochs=1, barebones=True, callbacks=[Notes("val_acc")]).fit(
            Dictated(), DataLoader(data(), 1), DataLoader(data(1), 1)
        )


def test_a_fit_that_has_observed_nothing_says_so() -> None:
    with pytest.warns(
        UserWarning, match=r"Notes never received a .* of 'val_acc', so nothing was noted. No validation ran"
    ):
        fit(Notes("val_acc"), check_val_every_n_epoch=EPOCHS + 1)


def test_something_is_told_once_in_a_fit() -> None:
    told: list[str] = []

    class Tells(Notes):
        def observe(self, trainer: pl.Trainer, value: float) -> None:
            self.tell_once("it", told.append, f"saw {value:.1f}.")

    callback = Tells("val_acc")
    fit(callback)
    fit(callback)
    assert told == ["Tells: saw 0.1.", "Tells: saw 0.1."]


# Resuming.


def saving(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, save_top_k=-1, every_n_train_steps=1, filename="{step}")


@pytest.mark.parametrize("interval", ["validation", "epoch"])
def test_what_it_decides_is_the_same_from_every_checkpoint(interval: Any, tmp_path: Path) -> None:
    """Also from those written before a validation that is due: by itself Lightning skips it, and the decision with it."""
    whole, steps = SlowDown(interval=interval), Steps()
    fit(whole, saving(tmp_path), steps)
    assert steps.seen[-1] == (EPOCHS - 1, 4 + 4 + 4 + 2 + 1 + 1), "steps by epoch"
    paths = sorted(tmp_path.glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    assert len(paths) == 16
    for path in paths[:-1]:
        rest, seen = SlowDown(interval=interval), Steps()
        fit(rest, seen, ckpt=path)
        assert seen.seen == steps.seen[-len(seen.seen) :], path.name
        assert_identical(rest.state_dict(), whole.state_dict())


def test_without_the_missed_validation_the_decision_is_another(tmp_path: Path) -> None:
    class Naive(pl.Callback):
        """Acts on the metric when a validation ends, as many callbacks do."""

        def __init__(self) -> None:
            self.values: list[float] = []

        def state_dict(self) -> dict[str, Any]:
            return {"values": self.values}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.values = list(state_dict["values"])

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            if not trainer.sanity_checking:
                self.values.append(trainer.callback_metrics["val_acc"].item())

    whole, notes, rest, again = Naive(), Notes("val_acc"), Naive(), Notes("val_acc")
    fit(whole, notes, saving(tmp_path))
    fit(rest, again, ckpt=tmp_path / f"step={2 * BATCHES}.ckpt")
    assert len(whole.values) == EPOCHS
    assert [value for _, value in again.values] == [value for _, value in notes.values[1:]]
    assert len(rest.values) == EPOCHS, "the run that is mended validates for all callbacks"
    alone = Naive()
    fit(alone, ckpt=tmp_path / f"step={2 * BATCHES}.ckpt")
    assert len(alone.values) == EPOCHS - 1


@pytest.mark.parametrize("changed", [{"monitor": "other"}, {"interval": "validation"}])
def test_another_metric_restarts(changed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Two(Dictated):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            self.log("other", 0.01 * self.current_epoch)

    said: list[str] = []
    monkeypatch.setattr("lightning_grad.core.callback.rank_zero_info", said.append)
    first = SlowDown()
    trainer, _ = fit(first, module=Two(VALUES), max_epochs=3)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    rest = SlowDown(**changed)
    fit(rest, module=Two(VALUES), ckpt=tmp_path / "first.ckpt")
    (name,) = changed
    line = f"SlowDown restarts its observations, because {name} changed; it goes on with 2 batches a step."
    assert line in said
    assert rest.observed == 3
    # Compared with the best accuracy of before, each value of the other metric would be a worse one.
    assert rest.state_dict()["count"] == (2 if name == "monitor" else 4)


def test_state_is_loaded_in_a_fit_only() -> None:
    callback, other = Notes("val_acc"), Notes("val_acc")
    fit(callback)
    other.load_state_dict(callback.state_dict())
    assert other.observed == 0


# Ranks.


class ByRank(Dictated):
    """Logs another value on each rank, without synchronization."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_acc", self.accuracy() + (0.3 if self.global_rank == 0 else -0.3) * (-1) ** self.current_epoch)


class Saves(pl.Callback):
    def __init__(self, callback: Any, folder: Path) -> None:
        self.callback, self.folder = callback, folder

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        torch.save(self.callback.state_dict(), self.folder / f"{trainer.global_rank}.pt")


@pytest.mark.parametrize("interval", ["validation", "epoch"])
def test_ranks_decide_together(interval: Any, tmp_path: Path) -> None:
    callback, alone = SlowDown(interval=interval), SlowDown(interval=interval)
    ranks = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False}
    fit(callback, Saves(callback, tmp_path), module=ByRank(VALUES), **ranks)
    fit(alone)
    states = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert_identical(states[0], states[1])
    assert states[0]["count"] == alone.state_dict()["count"] == 8
    assert states[0]["best"] == pytest.approx(0.5)


def test_a_class_that_forgets_to_observe_is_told() -> None:
    with pytest.raises(NotImplementedError, match=r"must define observe\(trainer, value\)"):
        fit(MonitoredCallback("val_acc"))
