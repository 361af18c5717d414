"""Modules, data and loaders that some technique refuses, each next to its like that it takes."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_grad.testing import BATCH, WIDTH, make_classifier, make_data


class Unvalidated(pl.LightningModule):
    """A network with one loss, and without validation_step."""

    def __init__(self, net: nn.Module | None = None, target: str = "class", optimizer: Any = None) -> None:
        super().__init__()
        self.net = (
            nn.Sequential(nn.Flatten(), nn.Linear(4 * WIDTH, 8), nn.ReLU(), nn.Linear(8, 4)) if net is None else net
        )
        self.target = target
        self.make = optimizer or (lambda parameters: torch.optim.Adam(parameters, lr=1e-2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        if self.target == "class":
            return F.cross_entropy(self(x), y)
        return F.mse_loss(self(x)[:, 0], y.float())

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(*batch)
        self.log("train_loss", loss.detach())
        return loss

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


class Tiny(Unvalidated):
    """A whole module; what a row is about is overridden."""

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(*batch)
        self.log("val_loss", loss.detach(), sync_dist=True)
        return loss


class HandWritten(Tiny):
    """Its loss calls no function of torch that is known for one."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return -self(x).log_softmax(1).gather(1, y[:, None]).mean()


class Sharpened(Tiny):
    """Its loss is two cross-entropies."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        logits = self(x)
        return F.cross_entropy(logits, y) + F.cross_entropy(2 * logits, y)


class RootMean(Tiny):
    """Its loss is a root of a mean, and no sum over samples."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self(x), F.one_hot(y, 4).float()).sqrt()


class Spread(Tiny):
    """Its loss is a cross-entropy and a spread over the batch, which is no sum over samples."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        logits = self(x)
        return F.cross_entropy(logits, y) + logits.std()


class Chunked(Tiny):
    """Its loss is computed in parts, unless it is told to do so in one call."""

    def __init__(self, chunks: int) -> None:
        super().__init__()
        self.chunks = chunks

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        parts = zip(self(x).chunk(self.chunks), y.chunk(self.chunks), strict=True)
        return torch.stack([F.cross_entropy(logits, part) for logits, part in parts]).mean()


class Detached(Tiny):
    """The loss does not depend on the input with gradients, unless it is told to."""

    def __init__(self, detach: bool) -> None:
        super().__init__()
        self.detaches = detach

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.detach() if self.detaches else x)


class Decaying(Tiny):
    """Changes a weight by hand: in the step, or after the batch."""

    def __init__(self, in_step: bool) -> None:
        super().__init__()
        self.in_step = in_step

    def decay(self) -> None:
        with torch.no_grad():
            self.net[1].weight.mul_(0.99)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.in_step:
            self.decay()
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, *_: Any) -> None:
        if not self.in_step:
            self.decay()


class OwnOptimizer(Tiny):
    """Steps an optimizer of its own, which it may also return."""

    def __init__(self, returned: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.returned = returned

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        if not self.returned:
            optimizer = LightningOptimizer(torch.optim.SGD(self.parameters(), lr=0.1))
            optimizer._strategy = self.trainer.strategy
        optimizer.zero_grad()
        self.manual_backward(self.loss(*batch))
        optimizer.step()


class Manual(Tiny):
    """A module under manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(*batch))
        optimizer.step()


class Unseen(Tiny):
    """Its steps show a loss to nobody, unless it returns what it computes."""

    def __init__(self, returns: bool) -> None:
        super().__init__()
        self.returns = returns

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return HandWritten.loss(self, *batch) if self.trainer.training else None

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        loss = HandWritten.loss(self, *batch)
        return loss if self.returns else None


class Two(Tiny):
    """Gets a batch of each of two loaders."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(*batch["a"]) + self.loss(*batch["b"])


class Scale(nn.Module):
    """A layer whose only parameter is a vector, or a complex one."""

    def __init__(self, dtype: Any = torch.float32) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4 * WIDTH, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) * self.scale).abs()[:, :4]


class Looked(nn.Module):
    """Looks words up, by its embedding or behind its back."""

    def __init__(self, as_module: bool = True, sparse: bool = False) -> None:
        super().__init__()
        self.words, self.head, self.as_module = nn.Embedding(10, 8, sparse=sparse), nn.Linear(8, 4), as_module

    def forward(self, x: Tensor) -> Tensor:
        found = self.words(x) if self.as_module else F.embedding(x, self.words.weight)
        return self.head(found.mean(1))


class Bytes(Tiny):
    """Converts bytes in the step, or where a callback can see it."""

    def __init__(self, early: bool) -> None:
        super().__init__()
        self.early = early

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return (batch[0].float() / 255, batch[1]) if self.early else batch

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.float())


def one_linear() -> Tiny:
    return Tiny(nn.Sequential(nn.Flatten(), nn.Linear(4 * WIDTH, 4)))


def words_module(**arguments: Any) -> Tiny:
    return Tiny(Looked(**arguments), optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))


def with_optimizer(make: Any) -> Any:
    """Return the ordinary classifier with another optimizer, or with what else configure_optimizers may return."""
    module = make_classifier()
    module.configure_optimizers = lambda: make(list(module.parameters()))
    return module


def sgd(parameters: Any) -> Any:
    return torch.optim.SGD(parameters, lr=0.1)


def adam(parameters: Any) -> Any:
    return torch.optim.Adam(parameters, lr=1e-3)


def partly_frozen() -> Any:
    module = make_classifier()
    for layer in (module.encoder, module.hidden):
        layer.requires_grad_(False)
    return module


def loader(dataset: Any = None, **arguments: Any) -> DataLoader[Any]:
    return DataLoader(make_data() if dataset is None else dataset, **{"batch_size": BATCH, **arguments})


def tokens() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    return loader(TensorDataset(torch.randint(10, (24, 4), generator=generator), torch.arange(24) % 4))


def pixels() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(256, (24, 4, WIDTH), generator=generator, dtype=torch.uint8)
    return loader(TensorDataset(drawn, torch.arange(24) % 4))


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(make_data())

    def __len__(self) -> int:
        return len(make_data())


class Feed:
    """Batches that no DataLoader made."""

    def __iter__(self) -> Any:
        return iter(loader())


class Batches:
    """A batch sampler of the user's; what a row is about is missing."""

    def __iter__(self) -> Any:
        return iter([list(range(start, start + BATCH)) for start in range(0, len(make_data()), BATCH)])


class Counted(Batches):
    def __len__(self) -> int:
        return len(make_data()) // BATCH


class Sized(Counted):
    batch_size = BATCH


class Uncounted(Batches):
    batch_size = BATCH


class Named(Dataset):
    """Samples under names, or under the indices by which it looks the names up."""

    def __init__(self, by_index: bool) -> None:
        self.samples = {f"s{number}": item for number, item in enumerate(make_data())}
        self.names, self.by_index = list(self.samples), by_index

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, key: Any) -> Any:
        return self.samples[self.names[key] if self.by_index else key]


class Keys:
    def __init__(self, keys: Any) -> None:
        self.keys = keys

    def __iter__(self) -> Any:
        return iter(self.keys)

    def __len__(self) -> int:
        return len(self.keys)


class Lists(Dataset):
    """Takes a list of indices, and gives a batch."""

    def __len__(self) -> int:
        return len(make_data())

    def __getitem__(self, indices: Any) -> Any:
        return make_data()[indices]


class ClippingOff(pl.Callback):
    """What the words say about a Trainer that a library builds."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        trainer.gradient_clip_val = None


def complex_net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), Scale(torch.complex64), nn.Linear(4, 4))


def nan_loss() -> Any:
    module = Tiny()
    module.loss = lambda x, y: F.cross_entropy(module(x), y) * float("nan")  # type: ignore[method-assign]
    return module
