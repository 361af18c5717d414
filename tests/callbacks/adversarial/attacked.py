"""Modules that are attacked in tests, what remembers the batches they see, and a replay of those without any attack."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_grad.callbacks.adversarial import AdversarialTraining
from lightning_grad.testing import make_trainer, state_of

BATCH, BATCHES, INPUTS, CLASSES = 8, 6, 6, 3


class Tape(partial):
    """Remembers what it is called with. Code, as a function is, so that what puts a module back leaves it alone."""

    seen: list[Any]

    def __new__(cls) -> Any:
        seen: list[Any] = []
        tape = super().__new__(cls, _note, seen)
        tape.seen = seen
        return tape


def _note(seen: list[Any], value: Any) -> None:
    seen.append(value.detach().clone() if isinstance(value, Tensor) else value)


class Linear(pl.LightningModule):
    """Its loss is linear in its input, so that the attack is known: by the sign of the weight, or along it."""

    def __init__(self, weight: Sequence[float] = (3.0, -4.0), lr: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(list(weight)))
        self.lr = lr
        self.tape = Tape()
        self.inputs: list[Tensor] = []  # of the real steps only: an attack leaves no trace in it

    def input_of(self, batch: Any) -> Tensor:
        return batch[0]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x = self.input_of(batch)
        self.tape(x)
        self.inputs.append(x.detach().clone())
        return (x @ self.weight).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Classifier(pl.LightningModule):
    """Logs, counts, drops out and normalises; remembers the batches of its real steps."""

    def __init__(self, dropout: float = 0.3, norm: bool = True) -> None:
        super().__init__()
        pl.seed_everything(3, verbose=False)
        self.body = nn.Sequential(nn.Linear(INPUTS, 16), nn.BatchNorm1d(16) if norm else nn.Tanh(), nn.ReLU())
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(16, CLASSES))
        self.accuracy = MulticlassAccuracy(CLASSES)
        self.batches: list[Any] = []
        self.drawn: list[float] = []
        self.log_calls = Tape()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        self.batches.append((x.detach().clone(), y))
        logits = self.head(self.body(x))
        self.drawn.append(torch.rand(()).item())
        loss = F.cross_entropy(logits, y)
        self.accuracy(logits.float(), y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        return loss

    def log(self, name: str, *args: Any, **kwargs: Any) -> None:
        self.log_calls(name)
        super().log(name, *args, **kwargs)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.02)


class Replay(IterableDataset[Any]):
    """Gives batches that somebody has recorded, an epoch at a time."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches, self.epoch = list(batches), 0

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Any:
        start, self.epoch = self.epoch * BATCHES, self.epoch + 1
        return iter(self.batches[start : start + BATCHES])


def samples(count: int = BATCH * BATCHES) -> TensorDataset:
    """Points whose class is where their first entries are largest."""
    x = torch.randn(count, INPUTS, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, x[:, :CLASSES].argmax(1))


def as_batches(batches: Any) -> DataLoader[Any]:
    """Return a loader that gives these objects as they are."""
    return DataLoader(batches, batch_size=None)


def points(batches: int = 2, size: int = 4, inputs: int = 2) -> DataLoader[Any]:
    x = torch.rand(batches * size, inputs, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x), size)


def half_precision(scale: float) -> list[Any]:
    """Return the plugin for fp16 with a loss scale, on the CPU."""
    return [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))]


def attacker(epsilon: float = 0.25, **arguments: Any) -> AdversarialTraining:
    """Build one that does not check itself, and begins at the inputs."""
    return AdversarialTraining(epsilon, **{"check_every_n_epochs": None, "random_start": False, **arguments})


def train(callbacks: Any, module: Any, loader: Any = None, ckpt: Any = None, **arguments: Any) -> pl.Trainer:
    """Fit and return the trainer."""
    callbacks = list(callbacks) if isinstance(callbacks, (list, tuple)) else [callbacks]
    trainer = make_trainer(callbacks=callbacks, **{"max_epochs": 1, "log_every_n_steps": 1, **arguments})
    trainer.fit(module, DataLoader(samples(), BATCH) if loader is None else loader, ckpt_path=ckpt)
    return trainer


def attacked_and_replayed(
    make_others: Callable[[], list[Any]],
    make_module: Callable[[], Classifier],
    folder: Path,
    make_arguments: Callable[[], dict[str, Any]] = dict,
    others_first: bool = False,
    **settings: Any,
) -> tuple[list[dict[str, Any]], list[Any]]:
    """Train under attack, and again, without attack, on the batches that the steps have seen.

    Args:
        make_others: Makes the other callbacks of both runs.
        make_module: Makes the module.
        folder: Where logs go.
        make_arguments: Makes arguments of both trainers.
        others_first: Whether the attack stands behind them in the list of callbacks.
        **settings: Those of the attack.

    Returns:
        tuple: What is left of both runs, and the batches.
    """
    found, batches = [], None
    for name in ("attacked", "replayed"):
        module = make_module()
        attackers = [attacker(**settings)] if batches is None else []
        loader = None if batches is None else as_batches(Replay(batches))
        logger = CSVLogger(folder / name, name="", version="")
        callbacks = [*make_others(), *attackers] if others_first else [*attackers, *make_others()]
        trainer = train(callbacks, module, loader, max_epochs=2, logger=logger, **make_arguments())
        found.append(result_of(trainer, module, folder / name))
        batches = batches or module.batches
    return found, batches or []


def result_of(trainer: pl.Trainer, module: Classifier, folder: Path) -> dict[str, Any]:
    """Return what a run has left but the callback's own logs."""
    header, *rows = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    lines = [
        [f"{key}={cell}" for key, cell in zip(header, row, strict=True) if _is_foreign(key) and cell] for row in rows
    ]
    return {
        "state": state_of(trainer, module),
        "metrics": {key: value for key, value in trainer.callback_metrics.items() if _is_foreign(key)},
        "lines": [line for line in lines if any(not cell.startswith(("epoch=", "step=")) for cell in line)],
        "drawn": module.drawn,
        "logged": [name for name in module.log_calls.seen if _is_foreign(name)],
        "counted": module.body[1].num_batches_tracked,
    }


def _is_foreign(key: str) -> bool:
    return not key.startswith("adversarial/")


class At(pl.Callback):
    """Calls functions at hooks of the trainer: ``At(on_train_batch_end=function)``, with all that the hook gets."""

    def __init__(self, **functions: Callable[..., Any]) -> None:
        for name, function in functions.items():
            setattr(self, name, function)
