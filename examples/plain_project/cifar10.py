"""The LightningDataModule of CIFAR-10, read from files on disk."""

import io
import pickle
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from plain_project.data import LoaderModule

MEAN = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
STD = torch.tensor([0.2470, 0.2435, 0.2616]).view(3, 1, 1)
BATCHES = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}

Split = Literal["train", "test"]


def read_cifar10(folder: str | Path, split: Split, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Read one split of CIFAR-10, from the standard Python batches or from an archive of JPEGs.

    The batches are pickles, so read only files that you trust.

    Args:
        folder: Folder with ``data_batch_1`` to ``data_batch_5`` and ``test_batch``, or with a subfolder
            ``cifar-10-batches-py`` of these, or with ``cifar10_train.npz`` and ``cifar10_test.npz``.
        split: ``"train"`` or ``"test"``.
        limit: Number of images to read, ``None`` for all.

    Returns:
        Images ``(n, 3, 32, 32)`` as uint8 and labels ``(n,)`` as int64.

    Raises:
        FileNotFoundError: If ``folder`` has none of these.
    """
    for candidate in (Path(folder), Path(folder) / "cifar-10-batches-py"):
        paths = [candidate / name for name in BATCHES[split]]
        if all(path.is_file() for path in paths):
            return _read_batches(paths, limit)
    archive = Path(folder) / f"cifar10_{split}.npz"
    if archive.is_file():
        return _read_archive(archive, limit)
    names = ", ".join(BATCHES[split])
    raise FileNotFoundError(
        f"No CIFAR-10 {split} split in {folder}. It must have {names}, in cifar-10-batches-py/ or not, "
        f"or {archive.name}."
    )


def _read_batches(paths: list[Path], limit: int | None) -> tuple[Tensor, Tensor]:
    batches = [pickle.loads(path.read_bytes(), encoding="bytes") for path in paths]
    images = np.concatenate([batch[b"data"] for batch in batches])[:limit]
    labels = np.concatenate([batch[b"labels"] for batch in batches])[:limit]
    return torch.from_numpy(images).view(-1, 3, 32, 32), torch.from_numpy(labels).long()


def _read_archive(path: Path, limit: int | None) -> tuple[Tensor, Tensor]:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(f"Decoding the JPEGs in {path} needs Pillow: pip install pillow.") from error
    with np.load(path) as stored:
        jpeg, offsets, labels = stored["jpeg"], stored["offsets"], stored["labels"][:limit]
    images = np.empty((len(labels), 32, 32, 3), dtype=np.uint8)
    for i in range(len(labels)):
        encoded = io.BytesIO(jpeg[offsets[i] : offsets[i + 1]].tobytes())
        images[i] = np.asarray(Image.open(encoded).convert("RGB"))
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels).long()


def flip_and_shift(images: Tensor, shift: int = 4) -> Tensor:
    """Mirror a random half of ``images`` and move each by up to ``shift`` pixels, filling with zeros."""
    n, channels, height, width = images.shape
    top, left = torch.randint(2 * shift + 1, (2, n, 1))
    flip = torch.rand(n, 1) < 0.5
    rows = top + torch.arange(height)
    columns = left + torch.where(flip, torch.arange(width).flip(0), torch.arange(width))
    padded = F.pad(images, (shift, shift, shift, shift))
    sample = torch.arange(n).view(n, 1, 1, 1)
    channel = torch.arange(channels).view(1, channels, 1, 1)
    return padded[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]


class Images(Dataset[tuple[Tensor, Tensor]]):
    """Images stored as bytes, returned normalized and optionally augmented.

    Args:
        images: uint8 images ``(n, 3, height, width)``.
        labels: Labels ``(n,)``.
        augment: Whether to flip and shift at random.
    """

    def __init__(self, images: Tensor, labels: Tensor, augment: bool = False) -> None:
        self.images = images
        self.labels = labels
        self.augment = augment

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return one image and its label."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        """Return the images and labels of a batch, which the loader requests together."""
        images = self.images[indices]
        if self.augment:
            images = flip_and_shift(images)
        return list(zip((images / 255 - MEAN) / STD, self.labels[indices], strict=True))


class CIFAR10(LoaderModule):
    """CIFAR-10 from local files, normalized per channel; see :func:`read_cifar10` for the formats.

    The last tenth of the training images (5000 without ``limit``) is for validation.

    Args:
        folder: Folder with the files.
        batch_size: Images per batch.
        limit: Number of images to read of the training and of the test files, ``None`` for all.
        num_workers: Worker processes of each loader.
        augment: Whether to flip and shift the training images at random.
    """

    def __init__(
        self,
        folder: str | Path,
        batch_size: int = 128,
        limit: int | None = None,
        num_workers: int = 0,
        augment: bool = True,
    ) -> None:
        super().__init__(batch_size, num_workers)
        self.folder = folder
        self.limit = limit
        self.augment = augment

    def setup(self, stage: str) -> None:
        """Read the split that ``stage`` needs."""
        if stage == "test":
            self.test_set = Images(*read_cifar10(self.folder, "test", self.limit))
        elif not hasattr(self, "train_set"):
            images, labels = read_cifar10(self.folder, "train", self.limit)
            cut = len(labels) - len(labels) // 10
            self.train_set = Images(images[:cut], labels[:cut], self.augment)
            self.val_set = Images(images[cut:], labels[cut:])

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the loader of the test set."""
        return self.loader(self.test_set)
