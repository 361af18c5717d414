"""Projects that are awkward on purpose; ``lightning-grad check tests.cli.awkward:NAME`` tries techniques on each."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, WeightedRandomSampler

from lightning_grad.testing import BATCH, make_classifier, make_data
from tests.contract.odd_projects import HandWritten, Manual, Tiny, Unvalidated

SAMPLES = 5 * BATCH
WORDS, LENGTH = 12, 6


def numbers() -> TensorDataset:
    return make_data(batches=5)


def loaders(dataset: Any = None) -> tuple[DataLoader[Any], DataLoader[Any]]:
    dataset = numbers() if dataset is None else dataset
    return DataLoader(dataset, BATCH, shuffle=True), DataLoader(dataset, BATCH)


def plain() -> Any:
    return Tiny(), *loaders()


def manual() -> Any:
    return Manual(), *loaders()


def whole_batches() -> Any:
    return Tiny(), DataLoader(numbers(), BATCH, shuffle=True, drop_last=True), loaders()[1]


class GAN(pl.LightningModule):
    """Two networks that train against each other, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8))
        self.critic = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (real,) = batch
        for_generator, for_critic = self.optimizers()  # type: ignore[attr-defined]
        made = self.generator(torch.randn(len(real), 4))
        fooled = F.softplus(self.critic(made.detach())).mean()
        self.step(for_critic, F.softplus(-self.critic(real)).mean() + fooled)
        self.step(for_generator, F.softplus(-self.critic(made)).mean())

    def step(self, optimizer: Any, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(net.parameters(), lr=1e-3) for net in (self.generator, self.critic)]


def gan() -> Any:
    return GAN(), DataLoader(TensorDataset(torch.randn(SAMPLES, 8)), BATCH, shuffle=True)


class Named(Dataset[dict[str, Tensor]]):
    """Samples that are mappings, as tokenizers make them."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(WORDS, (SAMPLES, LENGTH), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index].sum() % 3}


class OfMappings(Tiny):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch["input_ids"]), batch["labels"])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))


def mappings() -> Any:
    net = nn.Sequential(nn.Embedding(WORDS, 8), nn.Flatten(), nn.Linear(8 * LENGTH, 8), nn.ReLU(), nn.Linear(8, 3))
    return OfMappings(net), *loaders(Named())


@dataclass
class Output:
    loss: Tensor
    logits: Tensor


class PretrainedStyle(nn.Module):
    """A network that computes its loss itself and returns both in an object, as those of Hugging Face do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Embedding(WORDS, 8), nn.Linear(8, 8))
        self.score = nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Output:
        logits = self.score(self.body(input_ids).mean(1))
        return Output(F.cross_entropy(logits, labels), logits)


class Wrapper(OfMappings):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(**batch).loss


def pretrained_style() -> Any:
    return Wrapper(PretrainedStyle()), *loaders(Named())


def hugging_face() -> Any:
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=WORDS, max_position_embeddings=LENGTH, num_labels=3, **sizes)
    return Wrapper(transformers.BertForSequenceClassification(config)), *loaders(Named())


class Stream(IterableDataset[Any]):
    """Samples without end, which only their order tells apart."""

    def __iter__(self) -> Any:
        while True:
            x = torch.randn(4, 16)
            yield x, int(x[0, :4].argmax())


def stream() -> Any:
    return Tiny(), DataLoader(Stream(), BATCH)


def hand_written_loss() -> Any:
    return HandWritten(), *loaders()


def no_validation() -> Any:
    return Unvalidated(), loaders()[0]


class LSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.LSTM(16, 8, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x)[0][:, -1])


def lstm() -> Any:
    return Tiny(LSTM()), *loaders()


class Tied(nn.Module):
    """A language model whose output layer is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix, self.head = nn.Embedding(WORDS, 8), nn.Linear(8, 8), nn.Linear(8, WORDS, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.mix(self.words(ids)))


class NextWord(Tiny):
    def loss(self, ids: Tensor) -> Tensor:
        return F.cross_entropy(self(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def tied() -> Any:
    return NextWord(Tied()), *loaders(TensorDataset(Named().ids))


class Unused(Tiny):
    """Has a layer that its loss does not use, which DDP refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(2, 2)


def unused() -> Any:
    return Unused(), *loaders()


class Prepared(pl.LightningDataModule):
    """A datamodule with hyperparameters, which is slow to set up."""

    setups = 0

    def __init__(self, size: int = BATCH, weights: list[float] | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        type(self).setups += 1
        self.data = numbers()
        self.classes = 4

    def train_dataloader(self) -> Any:
        weights = self.hparams["weights"] or [1.0] * SAMPLES
        return DataLoader(self.data, self.hparams["size"], sampler=WeightedRandomSampler(weights, SAMPLES))

    def val_dataloader(self) -> Any:
        return DataLoader(self.data, self.hparams["size"])

    def teardown(self, stage: str) -> None:
        del self.data


class Asking(Tiny):
    """Asks its datamodule, its logger and its callbacks in hooks."""

    def on_fit_start(self) -> None:
        assert self.trainer.datamodule.classes == 4
        self.logger.experiment.config.update({"classes": 4})
        self.logger.log_image("first", [])

    def configure_callbacks(self) -> Any:
        return [ModelCheckpoint(dirpath="checkpoints_of_the_module")]


def datamodule() -> Any:
    return Asking(), Prepared()


class Restless(Tiny):
    """Changes the current folder, writes next to its logs, and stops early."""

    def on_fit_start(self) -> None:
        Path(self.trainer.log_dir, "notes.txt").write_text(self.logger.log_dir)
        os.chdir(self.trainer.log_dir)

    def on_validation_end(self) -> None:
        self.trainer.should_stop = True


def restless() -> Any:
    return Restless(), *loaders()


def other_namespace() -> Any:
    import pytorch_lightning

    return make_classifier(pytorch_lightning.LightningModule), *loaders()


class Counting(pl.Callback):
    """A callback of the user."""

    epochs = 0

    def __init__(self, step: int = 1) -> None:
        self.step = step

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        type(self).epochs += self.step


# Projects that cannot be tried.


def loaders_of(path: str) -> Any:
    return Tiny(), *loaders()


class Leaving(Tiny):
    def on_fit_start(self) -> None:
        sys.exit(3)


def leaving() -> Any:
    return Leaving(), *loaders()


def not_a_module() -> Any:
    return nn.Linear(1, 1), loaders()[0]


class Broken(Tiny):
    built = 0

    def __init__(self) -> None:
        super().__init__()
        type(self).built += 1

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise KeyError("the label is missing")


def broken() -> Any:
    return Broken(), *loaders()


class Unbuildable(Tiny):
    def __init__(self) -> None:
        raise ZeroDivisionError("no layers")


def unbuildable() -> Any:
    return Unbuildable(), *loaders()


class Interrupted(Tiny):
    """Is interrupted in the fit of this number."""

    fits = 0

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0 and self.current_epoch == 0:
            type(self).fits += 1
        if type(self).fits == 4:
            raise KeyboardInterrupt


class Terminated(Tiny):
    """Gets SIGTERM in its first step, after which Lightning raises a SystemExit of its own."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def terminated() -> Any:
    return Terminated(), *loaders()


def interrupted() -> Any:
    return Interrupted(), *loaders()
