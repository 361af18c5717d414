"""The tasks on which techniques are compared: images and a text, of a size that one CPU thread learns in seconds.

With ``--data FOLDER`` they are CIFAR-10 and the text ``tinyshakespeare.txt`` of that folder, else the digits of scikit-learn
and the source code of a few modules of Python, which need no download.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from lightning.pytorch import LightningModule
from plain_project import CharTransformer, Digits, ImageClassifier, Text
from plain_project.cifar10 import MEAN, STD, read_cifar10
from plain_project.data import LoaderModule, flip_labels
from plain_project.networks import ResidualNetwork
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset
from typing_extensions import override

IMAGES_READ, TRAINING_IMAGES, VALIDATION_IMAGES = 12_000, 5_000, 1_000
TEXT_FILE = "tinyshakespeare.txt"
CLASSES, STAGES = 10, (1, 1, 1)


class FewImages(LoaderModule):
    """Some images of CIFAR-10 for training and validation, and all test images.

    Args:
        folder: Folder with CIFAR-10.
        seed: Seed of the choice of images and of the wrong labels.
        flip: Share of the training labels that are replaced by another class.
        batch_size: Images per batch.

    Attributes:
        flipped: After ``setup``, the sorted indices of the training images whose labels are replaced.
    """

    train_set: TensorDataset

    def __init__(self, folder: Path, seed: int, flip: float = 0.0, batch_size: int = 64) -> None:
        super().__init__(batch_size)
        self.folder = folder
        self.seed = seed
        self.flip = flip

    @override
    def setup(self, stage: str) -> None:
        images, labels = normalized(self.folder, "train", IMAGES_READ)
        order = torch.from_numpy(np.random.default_rng(self.seed).permutation(len(labels)))
        train, rest = order[:TRAINING_IMAGES], order[TRAINING_IMAGES:]
        val = rest[:VALIDATION_IMAGES]
        train_labels, self.flipped = flip_labels(labels[train], self.flip, CLASSES, self.seed)
        self.train_set = TensorDataset(images[train], train_labels)
        self.val_set = TensorDataset(images[val], labels[val])

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the loader of the test set."""
        return DataLoader(TensorDataset(*normalized(self.folder, "test", None)), 500)


@cache
def normalized(folder: Path, split: Any, limit: int | None) -> tuple[Tensor, Tensor]:
    """Return normalized images and their labels; they are read once in a process."""
    images, labels = read_cifar10(folder, split, limit)
    return (images / 255 - MEAN) / STD, labels


class TestedText(Text):
    """A text whose last tenth is halved: the first half for validation, the second for the test."""

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        cut, count = len(self.val_set) // 2, len(self.val_set)  # type: ignore[arg-type]
        self.val_set, self.test_set = Subset(self.val_set, range(cut)), Subset(self.val_set, range(cut, count))

    @override
    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.val_set, 250)

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the loader of the test set."""
        return DataLoader(self.test_set, 250)


class ImageTask:
    """Classify images: 5,000 images of CIFAR-10, or the digits, by a residual network.

    Attributes:
        unit: Unit of the length of a training.
        validations: Validations during a training.
        metric: What a claim compares, and by what it chooses the rates.
    """

    unit, validations = "epochs", 4
    metric: ClassVar[Mapping[str, Any]] = {
        "metric": "test_accuracy",
        "higher": True,
        "scale": 100.0,
        "unit": "%",
        "chosen_by": "validation_accuracy",
    }

    def name(self, folder: Path | None) -> str:
        """Return the name of the data."""
        return "CIFAR-10" if folder else "digits"

    def check(self, folder: Path) -> None:
        """Raise ValueError if a folder does not have the data."""
        try:
            read_cifar10(folder, "train", 1)
        except (FileNotFoundError, ImportError) as error:
            raise ValueError(str(error)) from error

    def data(self, folder: Path | None, seed: int, flip: float) -> FewImages | Digits:
        """Return new data."""
        return FewImages(folder, seed, flip) if folder else Digits(seed=seed, flip=flip)

    def module(self, data: Any, rate: float | None, options: Mapping[str, Any]) -> LightningModule:
        """Return a new module."""
        given: dict[str, Any] = {"optimizer": "sgd", "lr": rate or 0.1, "weight_decay": 5e-4}
        return ImageClassifier(network(data), **given | dict(options))


def network(data: FewImages | Digits) -> nn.Module:
    """Return the network of a data set.

    For CIFAR-10, the four pixels of each 2x2 square become channels. This loses nothing, and all layers cost a fourth.
    """
    if isinstance(data, Digits):
        return ResidualNetwork(1, 8, STAGES, CLASSES)
    return nn.Sequential(nn.PixelUnshuffle(2), ResidualNetwork(12, 16, STAGES, CLASSES))


class TextTask:
    """Predict the next character of a text by a transformer of half a million weights; see :class:`ImageTask`."""

    unit, validations = "steps", 2
    metric: ClassVar[Mapping[str, Any]] = {
        "metric": "test_loss",
        "higher": False,
        "scale": 1.0,
        "unit": "nats",
        "chosen_by": "validation_loss",
    }

    def name(self, folder: Path | None) -> str:
        """Return the name of the data."""
        return "tinyshakespeare" if folder else "Python sources"

    def check(self, folder: Path) -> None:
        """Raise ValueError if a folder does not have the data."""
        if not (folder / TEXT_FILE).is_file():
            raise ValueError(f"there is no {TEXT_FILE} in {folder}.")

    def data(self, folder: Path | None, seed: int, flip: float) -> TestedText:
        """Return new data."""
        return TestedText(folder / TEXT_FILE if folder else None, batch_size=16)

    def module(self, data: Any, rate: float | None, options: Mapping[str, Any]) -> LightningModule:
        """Return a new module."""
        given: dict[str, Any] = {"width": 104, "depth": 4, "lr": rate or 5e-3}
        return CharTransformer(data.vocabulary_size, data.context, **given | dict(options))


TASKS: dict[str, ImageTask | TextTask] = {"images": ImageTask(), "text": TextTask()}


def pixels(data: FewImages | Digits) -> dict[str, Any]:
    """Return the arguments of attacks for normalized images, after ``setup``, with epsilon in pixels from 0 to 1."""
    if isinstance(data, Digits):
        return {"bounds": (0.0, 1.0), "mean": [data.mean], "std": [data.std]}
    return {"bounds": (0.0, 1.0), "mean": MEAN.flatten().tolist(), "std": STD.flatten().tolist()}
