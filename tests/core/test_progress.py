"""Progress is the share of the run that is done, whatever ends the run; asked in the optimizers' post hooks."""

from fractions import Fraction
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_grad.core.progress import check_total_steps, run_progress, total_steps

BATCHES = 4


class Plain(pl.LightningModule):
    """One weight, one optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.layer(batch[0]).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class Validated(Plain):
    """Validates, on fewer batches than it trains on."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def val_dataloader(self) -> Any:
        return loader(3)


class TwoOptimizers(Plain):
    """Both optimizers step on every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.layer(batch[0]).sum())
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD([self.layer.weight], 0.1), torch.optim.SGD([self.layer.bias], 0.1)]


class EverySecondBatch(TwoOptimizers):
    """One optimizer, stepped on odd batches."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(self.layer(batch[0]).sum())
        if batch_idx % 2:
            self.optimizers().step()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class Stream(IterableDataset):
    """Data without a length."""

    def __iter__(self) -> Any:
        yield from ([torch.ones(1)] for _ in range(BATCHES))


class Recorder(pl.Callback):
    """Asks for the progress after every optimizer step, and for the length before the first."""

    def __init__(self) -> None:
        self.seen: list[float] = []
        self.length: int | None = 0
        self.lengths: list[int | None] = []
        self.at_ends: list[float] = []
        self.stated: int | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.length = total_steps(trainer, "Recorder", self.stated)
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(lambda *_: self._see(trainer))

    def _see(self, trainer: pl.Trainer) -> None:
        self.seen.append(run_progress(trainer, steps_ahead=1, stated=self.stated))
        self.lengths.append(total_steps(trainer, "Recorder", self.stated))

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.at_ends.append(run_progress(trainer, stated=self.stated))


def loader(batches: int = BATCHES) -> DataLoader:
    return DataLoader(TensorDataset(torch.ones(batches, 1)))


def fit(
    module: pl.LightningModule, data: Any = None, ckpt_path: Any = None, stated: int | None = None, **arguments: Any
) -> Recorder:
    recorder = Recorder()
    recorder.stated = stated
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    arguments = {"callbacks": [], "enable_checkpointing": False, **arguments}
    arguments["callbacks"] = [recorder, *arguments["callbacks"]]
    pl.Trainer(**quiet, **arguments).fit(module, loader() if data is None else data, ckpt_path=ckpt_path)
    return recorder


def shares(done: list[int], of: int) -> list[float]:
    return [float(Fraction(step, of)) for step in done]


@pytest.mark.parametrize(
    ("arguments", "done", "of", "length"),
    [
        ({"max_epochs": 2}, range(1, 9), 8, 8),
        ({"max_epochs": 1}, range(1, 5), 4, 4),
        ({"max_epochs": 2, "accumulate_grad_batches": 3}, [3, 4, 7, 8], 8, 4),
        ({"max_epochs": 3, "accumulate_grad_batches": 2}, range(2, 13, 2), 12, 6),
        ({"max_epochs": 2, "limit_train_batches": 3}, range(1, 7), 6, 6),
        ({"max_epochs": 2, "limit_train_batches": 0.5}, range(1, 5), 4, 4),
        ({"max_steps": 6}, range(1, 7), 6, 6),
        ({"max_steps": 3, "accumulate_grad_batches": 3}, range(1, 4), 3, 3),
        ({"max_epochs": 2, "max_steps": 6}, range(1, 7), 6, 6),
        ({"max_epochs": 2, "max_steps": 20}, range(1, 9), 8, 8),
        ({"max_epochs": -1, "max_steps": 5}, range(1, 6), 5, 5),
    ],
    ids=str,
)
def test_progress_after_each_step_of_automatic_optimization(
    arguments: dict[str, Any], done: list[int], of: int, length: int
) -> None:
    recorder = fit(Plain(), **arguments)
    assert recorder.seen == shares(list(done), of)
    assert recorder.seen[-1] == 1.0
    assert recorder.length == length


@pytest.mark.parametrize(
    ("module", "arguments", "expected"),
    [
        (TwoOptimizers, {"max_epochs": 2}, [step / 8 for step in range(1, 9) for _ in range(2)]),
        (TwoOptimizers, {"max_steps": 8}, shares(list(range(1, 9)), 8)),
        (TwoOptimizers, {"max_epochs": 2, "max_steps": 8}, shares(list(range(1, 9)), 8)),
        (EverySecondBatch, {"max_epochs": 2}, shares([2, 4, 6, 8], 8)),
        (EverySecondBatch, {"max_steps": 3}, shares([1, 2, 3], 3)),
    ],
)
def test_progress_under_manual_optimization(
    module: type[pl.LightningModule], arguments: dict[str, Any], expected: list[float]
) -> None:
    assert fit(module(), **arguments).seen == expected


def test_progress_of_data_without_a_length_is_the_share_of_steps() -> None:
    recorder = fit(Plain(), DataLoader(Stream()), max_steps=6, max_epochs=5)
    assert recorder.seen == shares(list(range(1, 7)), 6)
    assert recorder.length == 6


def test_validation_in_between_does_not_count() -> None:
    assert fit(Validated(), max_epochs=2, val_check_interval=2).seen == shares(list(range(1, 9)), 8)


@pytest.mark.parametrize("arguments", [{"max_epochs": 3}, {"max_epochs": -1, "max_steps": 12}], ids=str)
def test_progress_goes_on_after_a_resume(arguments: dict[str, Any], tmp_path) -> None:
    class Saver(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "second.ckpt")

    whole = fit(Plain(), callbacks=[Saver()], **arguments)
    resumed = fit(Plain(), ckpt_path=tmp_path / "second.ckpt", **arguments)
    assert whole.seen == shares(list(range(1, 13)), 12)
    assert resumed.seen == whole.seen[8:]


@pytest.mark.parametrize(
    ("arguments", "stream"),
    [
        ({"max_epochs": -1}, False),
        ({"max_epochs": -1}, True),
        ({"max_epochs": 1}, True),
        ({"max_time": {"hours": 1}}, False),
    ],
)
def test_run_without_a_known_end_is_refused(arguments: dict[str, Any], stream: bool) -> None:
    said = r"Recorder needs the length of the run.*Set total_steps=\.\.\. of Recorder or Trainer\(max_steps="
    with pytest.raises(ValueError, match=said):
        fit(Plain(), DataLoader(Stream()) if stream else loader(), **arguments)


# A length that the user states.


@pytest.mark.parametrize("arguments", [{"max_epochs": -1}, {"max_time": {"hours": 1}}, {"max_epochs": 1}], ids=str)
def test_a_stated_length_places_a_run_without_an_end(arguments: dict[str, Any]) -> None:
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 7

    data = DataLoader(Stream()) if arguments == {"max_epochs": 1} else loader()
    recorder = fit(Plain(), data, stated=5, callbacks=[Stop()], **arguments)
    steps = BATCHES if arguments == {"max_epochs": 1} else 7
    assert recorder.seen == [min(step / 5, 1.0) for step in range(1, steps + 1)]
    assert recorder.length == 5


def test_a_stated_length_counts_where_the_trainer_has_another() -> None:
    assert fit(Plain(), stated=16, max_epochs=2).seen == shares(list(range(1, 9)), 16)


def test_a_stated_length_goes_on_after_a_resume(tmp_path) -> None:
    class Saver(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / "first.ckpt")

    fit(Plain(), stated=12, max_epochs=1, callbacks=[Saver()])
    assert fit(Plain(), stated=12, max_epochs=3, ckpt_path=tmp_path / "first.ckpt").seen == shares(range(5, 13), 12)


@pytest.mark.parametrize("number", [0, -1])
def test_a_stated_length_is_checked(number: int) -> None:
    with pytest.raises(ValueError, match="total_steps must be at least 1"):
        check_total_steps(number)
    check_total_steps(None)


# A length that the first epoch shows.


class Uneven(IterableDataset):
    """Data without a length, of another size in each epoch."""

    def __init__(self, *sizes: int) -> None:
        self.sizes, self.epoch = sizes, 0

    def __iter__(self) -> Any:
        self.epoch += 1
        yield from ([torch.ones(1)] for _ in range(self.sizes[min(self.epoch, len(self.sizes)) - 1]))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_first_epoch_shows_how_long_an_epoch_is(accumulate: int) -> None:
    recorder = fit(Plain(), DataLoader(Stream()), max_epochs=3, accumulate_grad_batches=accumulate)
    steps = BATCHES // accumulate
    assert recorder.seen == [0.0] * steps + shares(list(range(steps + 1, 3 * steps + 1)), 3 * steps)
    assert recorder.length is None
    assert recorder.lengths == [None] * steps + [3 * steps] * 2 * steps


def test_epochs_of_different_lengths_are_measured_by_their_mean() -> None:
    recorder = fit(Plain(), DataLoader(Uneven(4, 2, 5, 1)), max_epochs=4)
    # The second epoch is measured by 4 batches, the third by 3, the fourth by 11 / 3; each ends where it should.
    second, third = [(1 + 1 / 4) / 4, 2 / 4], [(2 + share) / 4 for share in (1 / 3, 2 / 3, 1, 1, 1)]
    assert recorder.at_ends == pytest.approx([0.0] * 4 + second + third + [1.0])
    assert recorder.at_ends == sorted(recorder.at_ends)


def test_a_measured_epoch_goes_on_after_a_resume(tmp_path) -> None:
    class Saver(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    whole = fit(Plain(), DataLoader(Stream()), max_epochs=4, callbacks=[Saver()])
    for epoch in range(3):
        resumed = fit(Plain(), DataLoader(Stream()), max_epochs=4, ckpt_path=tmp_path / f"{epoch}.ckpt")
        assert resumed.seen == whole.seen[(epoch + 1) * BATCHES :]
