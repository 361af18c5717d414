"""A small project: an ordinary LightningModule, data, loaders and a Trainer. It does not import lightning-grad."""

import functools
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

BATCH, BATCHES, TOKENS, WIDTH, CLASSES = 8, 6, 4, 16, 4
VALIDATION_BATCHES = 2

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, foreach=True),  # as by default on a GPU
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
}


class Mix(nn.Module):
    """A custom module that accesses its parameter through ``_parameters``."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self._parameters["w"].T  # type: ignore[union-attr]


@functools.cache
def _classifier_class(base: Any, optimizer: str, manual: bool) -> Callable[[], Any]:
    class Classifier(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.mix = Mix()
            self.encoder = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.0, batch_first=True)
            self.hidden = nn.Linear(WIDTH, 32)
            self.norm = nn.BatchNorm1d(32)
            self.head = nn.Linear(32, CLASSES)
            self.automatic_optimization = not manual
            self.validated: list[Tensor] = []

        def forward(self, x: Tensor) -> Any:
            x = self.encoder(self.mix(x)).mean(1)
            return self.head(F.relu(self.norm(self.hidden(x))))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            if not manual:
                loss = F.cross_entropy(self(x), y)
                self.log("train_loss", loss)
                return loss
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                loss = F.cross_entropy(self(x), y)
                self.manual_backward(loss)
                optimizer.step()
            self.log("train_loss", loss)
            return loss

        def on_validation_start(self) -> None:
            self.validated = []

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            x, y = batch
            logits = self(x)
            self.validated.append(logits.detach().clone())
            self.log("val_loss", F.cross_entropy(logits, y), sync_dist=True)
            self.log("val_acc", (logits.argmax(1) == y).float().mean(), sync_dist=True)

        def configure_optimizers(self) -> Any:
            if manual:
                body = [*self.mix.parameters(), *self.encoder.parameters()]
                rest = [*self.hidden.parameters(), *self.norm.parameters(), *self.head.parameters()]
                return [OPTIMIZERS[optimizer](body), OPTIMIZERS[optimizer](rest)]
            chosen = OPTIMIZERS[optimizer](self.parameters())
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(chosen, 24)
            return {"optimizer": chosen, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    of = f"{base.__module__}.{base.__qualname__}".replace(".", "_")
    Classifier.__qualname__ = f"Classifier_{of}_{optimizer}_{manual}"
    globals()[Classifier.__qualname__] = Classifier  # where pickle looks for it
    return Classifier


def make_classifier(base: type = pl.LightningModule, optimizer: str = "adamw", manual: bool = False) -> Any:
    """Build a small sequence classifier on a LightningModule of either namespace, after seeding."""
    pl.seed_everything(7, verbose=False)
    return _classifier_class(base, optimizer, manual)()


def make_data(seed: int = 0, batches: int = BATCHES) -> TensorDataset:
    """Return sequences whose class is the index of the largest of the first ``CLASSES`` entries of the first token."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH * batches, TOKENS, WIDTH, generator=generator)
    return TensorDataset(x, x[:, 0, :CLASSES].argmax(1))


class ResumableLoader(DataLoader[Any]):
    """A loader that can resume within an epoch, which Lightning requires for an exact resume there.

    It does not work if the data is loaded before the loops of the fit are restored (``estimated_stepping_batches``).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._given = self._skip = 0

    def __iter__(self) -> Any:
        self._given, skip, self._skip = self._skip, self._skip, 0
        for index, batch in enumerate(super().__iter__()):
            if index >= skip:
                self._given += 1
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"given": self._given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._skip = state["given"] % len(self)


def loaders(resumable: bool = False) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Return the training and validation loaders, without shuffling; validation has fewer batches."""
    kind = ResumableLoader if resumable else DataLoader
    return kind(make_data(0), BATCH), DataLoader(make_data(1, VALIDATION_BATCHES), BATCH)


def make_trainer(trainer_class: type = pl.Trainer, **arguments: Any) -> Any:
    """Build a CPU trainer without logger, checkpoints, progress bar and summary."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    defaults = {"accelerator": "cpu", "devices": 1, "max_epochs": 4, "log_every_n_steps": 2, **quiet}
    return trainer_class(**{**defaults, **arguments})


def fit(callbacks: list[Any], module: Any = None, resumable: bool = False, ckpt: Any = None, **arguments: Any) -> Any:
    """Fit a module, by default a new classifier, and return (trainer, module)."""
    module = make_classifier() if module is None else module
    if any(isinstance(callback, pl.callbacks.Checkpoint) for callback in callbacks):
        arguments.setdefault("enable_checkpointing", True)
    trainer = make_trainer(callbacks=list(callbacks), **arguments)
    train, validation = loaders(resumable)
    trainer.fit(module, train, validation, ckpt_path=ckpt)
    return trainer, module
