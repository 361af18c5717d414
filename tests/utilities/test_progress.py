"""Progress is the share of the run that is done, whatever ends the run; asked in the optimizers' post hooks."""

from fractions import Fraction
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_grad.utilities.progress import run_progress, total_steps

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
        self.length = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.length = total_steps(trainer, "Recorder")
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(lambda *_: self.seen.append(run_progress(trainer, steps_ahead=1)))


def loader(batches: int = BATCHES) -> DataLoader:
    return DataLoader(TensorDataset(torch.ones(batches, 1)))


def fit(module: pl.LightningModule, data: Any = None, ckpt_path: Any = None, **arguments: Any) -> Recorder:
    recorder = Recorder()
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
    ("arguments", "stream"), [({"max_epochs": -1}, False), ({"max_epochs": -1}, True), ({"max_epochs": 2}, True)]
)
def test_run_without_a_known_end_is_refused(arguments: dict[str, Any], stream: bool) -> None:
    said = r"Recorder places its phases by the length of the run.*max_steps=\.\.\."
    with pytest.raises(ValueError, match=said):
        fit(Plain(), DataLoader(Stream()) if stream else loader(), **arguments)
