"""Claims about data of several domains, of which one matches the target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from plain_project.data import LoaderModule
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset
from typing_extensions import override

from studies.claim import Run
from studies.common import Follow
from studies.on_task import FitClock, OnTask
from studies.pretrained import tensors_of
from studies.tasks import CLASSES, TASKS

NAMES = ["match", "plus one", "plus two", "plus three"]  # what a domain does to the number of a class
DOMAINS = len(NAMES)


@dataclass(frozen=True, kw_only=True)
class OfDomains(OnTask):
    """Arms on images from four domains, which number the classes in four ways. Validation and test number as the first does.

    Args:
        percent: Share of the first domain in the training images, in percent; the others share the rest equally.
    """

    choices: ClassVar[Mapping[str, Sequence[str]]] = {"task": ("images",)}
    percent: int = 40

    @override
    def check(self) -> None:
        super().check()
        if self.percent > 99:
            raise ValueError(f"percent must be at most 99; got {self.percent}.")

    @override
    def fitted(self, run: Run, first: Sequence[Callback] = ()) -> tuple[Trainer, LightningModule, Any, FitClock]:
        """Train on all domains; see :class:`OnTask`."""
        arm, task, clock = self.table[run.arm], TASKS[self.task], FitClock()
        source = task.data(self.data, run.seed, self.flip)
        source.setup("fit")
        data = Data(source, self.percent / 100, run.seed)
        limits, length = self.limits(arm, len(data.train_dataloader()))
        callbacks = [clock, Follow(run.show, "val_acc"), *first, *arm.build(length)]
        batches: dict[str, Any] = dict.fromkeys(("limit_train_batches", "limit_val_batches"), self.limit_batches)
        trainer = self.trainer(run, callbacks, **{**limits, **batches, **arm.trainer})
        module = task.module(source, run.rate, arm.module)
        trainer.fit(module, data)
        return trainer, module, data, clock


class Data(LoaderModule):
    """The training images of other data in domains, and its validation and test images as they are.

    Args:
        source: The other data, set up.
        share: Share of the first domain.
        seed: Seed of the choice of images.
    """

    def __init__(self, source: Any, share: float, seed: int) -> None:
        super().__init__(source.batch_size)
        inputs, targets = tensors_of(source.train_set)
        order = torch.from_numpy(np.random.default_rng([seed, DOMAINS]).permutation(len(targets)))
        own = round(share * len(targets))
        parts = [order[:own], *order[own:].tensor_split(DOMAINS - 1)]
        self.train_set = ConcatDataset(
            [TensorDataset(inputs[part], (targets[part] + shift) % CLASSES) for shift, part in enumerate(parts)]
        )
        self.val_set = source.val_set
        self.test_set = source.test_dataloader().dataset

    @override
    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.val_set, 250)

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the loader of the test set."""
        return DataLoader(self.test_set, 250)
