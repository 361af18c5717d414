"""The LightningDataModules of the project that need no download."""

import sysconfig
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

STDLIB_FILES = ("argparse.py", "difflib.py", "doctest.py", "optparse.py", "random.py", "textwrap.py")


class LoaderModule(LightningDataModule):
    """Loaders of the data sets ``train_set`` and ``val_set``, which a subclass creates in ``setup``.

    Args:
        batch_size: Samples per batch.
        num_workers: Worker processes of each loader.
    """

    train_set: Dataset[Any]
    val_set: Dataset[Any]

    def __init__(self, batch_size: int, num_workers: int = 0) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.num_workers = num_workers

    def loader(self, dataset: Dataset[Any], shuffle: bool = False) -> DataLoader[Any]:
        """Return a loader over ``dataset``."""
        return DataLoader(
            dataset,
            self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the shuffled loader of the training set."""
        return self.loader(self.train_set, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the loader of the validation set."""
        return self.loader(self.val_set)


def flip_labels(labels: Tensor, share: float, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Replace the labels of randomly chosen samples by a random other class.

    Args:
        labels: Labels ``(n,)``.
        share: Share of the samples, 0 to 1, whose labels are replaced.
        classes: Number of classes, at least two.
        seed: Seed of the choice.

    Returns:
        New labels ``(n,)``, and the sorted indices of the replaced ones.
    """
    # numpy, not torch: code that selects samples with torch and the same seed would otherwise select exactly these.
    generator = np.random.default_rng(seed)
    count = round(share * len(labels))
    chosen = torch.from_numpy(generator.permutation(len(labels))[:count]).sort().values
    flipped = labels.clone()
    flipped[chosen] += torch.from_numpy(generator.integers(1, classes, count))
    return flipped % classes, chosen


class Digits(LoaderModule):
    """The 1797 handwritten 8x8 digits that ship with scikit-learn, standardized.

    The split into 1400 training, 197 validation and 200 test images is stratified by class.

    Args:
        batch_size: Images per batch.
        num_workers: Worker processes of each loader.
        seed: Seed of the split, of the noise and of the wrong labels.
        noise: Standard deviation of Gaussian noise added once to the training images, ``None`` for none.
        flip: Share of the training labels that are replaced by another class.

    Attributes:
        flipped: After ``setup``, the sorted indices of the training images whose labels are replaced.
        mean: After ``setup``, the mean that was subtracted from pixels between 0 and 1.
        std: After ``setup``, the standard deviation by which they were divided.
    """

    def __init__(
        self,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        noise: float | None = None,
        flip: float = 0.0,
    ) -> None:
        super().__init__(batch_size, num_workers)
        self.seed = seed
        self.noise = noise
        self.flip = flip

    def setup(self, stage: str) -> None:
        """Load, split and standardize the images."""
        images, labels = load_digits(return_X_y=True)
        x = torch.from_numpy(images).float().view(-1, 1, 8, 8) / 16
        y = torch.from_numpy(labels)
        train, val, test = (torch.from_numpy(indices) for indices in self.split(labels))
        self.mean, self.std = x[train].mean().item(), x[train].std().item()
        x = (x - self.mean) / self.std
        if self.noise is not None:
            generator = torch.Generator().manual_seed(self.seed)
            x[train] += self.noise * torch.randn(x[train].shape, generator=generator)
        train_labels, self.flipped = flip_labels(y[train], self.flip, int(y.max()) + 1, self.seed)
        self.train_set = TensorDataset(x[train], train_labels)
        self.val_set = TensorDataset(x[val], y[val])
        self.test_set = TensorDataset(x[test], y[test])

    def split(self, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the indices of the training, validation and test images."""
        rest, test = train_test_split(np.arange(len(labels)), test_size=200, stratify=labels, random_state=self.seed)
        train, val = train_test_split(rest, test_size=197, stratify=labels[rest], random_state=self.seed)
        return train, val, test

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the loader of the test set."""
        return self.loader(self.test_set)


class Text(LoaderModule):
    """Consecutive windows of a text; the target is the same window shifted by one character.

    The first nine tenths of the text are for training, the last tenth is for validation. The vocabulary
    is the sorted set of the characters of the whole text.

    Args:
        path: UTF-8 text file. ``None`` reads the source of a few modules of the running Python's standard
            library, about 400 kB that need no download but differ slightly between Python versions.
        context: Characters per window.
        batch_size: Windows per batch.
        num_workers: Worker processes of each loader.
    """

    def __init__(
        self, path: str | Path | None = None, context: int = 64, batch_size: int = 32, num_workers: int = 0
    ) -> None:
        super().__init__(batch_size, num_workers)
        self.path = path
        self.context = context

    @cached_property
    def text(self) -> str:
        """The whole text."""
        if self.path is not None:
            return Path(self.path).read_text(encoding="utf-8")
        stdlib = Path(sysconfig.get_path("stdlib"))
        return "\n".join((stdlib / name).read_text(encoding="utf-8") for name in STDLIB_FILES)

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """The id of each character."""
        return {character: i for i, character in enumerate(sorted(set(self.text)))}

    @property
    def vocabulary_size(self) -> int:
        """The number of distinct characters."""
        return len(self.vocabulary)

    def encode(self, text: str) -> Tensor:
        """Return the ids of the characters of ``text``. All must be in the vocabulary."""
        return torch.tensor([self.vocabulary[character] for character in text])

    def decode(self, ids: Tensor) -> str:
        """Return the text of ``ids``."""
        characters = list(self.vocabulary)
        return "".join(characters[i] for i in ids.tolist())

    def setup(self, stage: str) -> None:
        """Encode the text and cut it into windows."""
        ids = self.encode(self.text)
        cut = len(ids) * 9 // 10
        self.train_set = self.windows(ids[:cut])
        self.val_set = self.windows(ids[cut:])

    def windows(self, ids: Tensor) -> TensorDataset:
        """Cut ``ids`` into windows and their targets, dropping the incomplete last one.

        Raises:
            ValueError: If there are too few ``ids`` for one window.
        """
        count = (len(ids) - 1) // self.context
        if count < 1:
            raise ValueError(f"{len(ids)} characters are too few for one window of context={self.context}.")
        inputs, targets = ids[: count * self.context], ids[1 : count * self.context + 1]
        return TensorDataset(inputs.view(count, -1), targets.view(count, -1))
