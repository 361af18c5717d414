"""Few samples chosen for a target: LESS, against EL2N and a random choice, where few samples are of the target's domain."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from plain_project.data import LoaderModule
from torch.utils.data import DataLoader, Subset, TensorDataset
from typing_extensions import override

from lightning_grad.callbacks import DataPruning
from studies.arms import Arm, OfEpochs, Use
from studies.claim import Paper, Run
from studies.common import Follow
from studies.on_task import ON_PURPOSE, FitClock, OnTask
from studies.pretrained import tensors_of, turned
from studies.tasks import CLASSES, TASKS

RATES, SCORED = (1e-3, 3e-3, 1e-2, 3e-2), 0.25  # share of the epochs before the samples are chosen
IMAGES = TASKS["images"].metric


@dataclass(frozen=True, kw_only=True)
class Targeted(OnTask):
    """Arms that train on few samples, and are tested on turned images, as few of the training images are.

    Args:
        planted: Share of the training images that are turned.
    """

    planted: float = 0.1

    @override
    def fitted(self, run: Run, first: Sequence[Callback] = ()) -> tuple[Trainer, LightningModule, Any, FitClock]:
        """Train; see :class:`OnTask`."""
        warnings.filterwarnings("ignore", f".*({ON_PURPOSE})")
        arm, task, clock = self.table[run.arm], TASKS[self.task], FitClock()
        source = task.data(self.data, run.seed, self.flip)
        source.setup("fit")
        data = Planted(source, self.planted, run.seed)
        limits, length = self.limits(arm, len(data.train_dataloader()))
        callbacks = [clock, Follow(run.show, "val_acc"), *first, *arm.build(length)]
        few: dict[str, Any] = dict.fromkeys(("limit_train_batches", "limit_val_batches"), self.limit_batches)
        trainer = self.trainer(run, callbacks, **{**limits, **few, **arm.trainer})
        module = task.module(source, run.rate, arm.module)
        trainer.fit(module, data)
        return trainer, module, data, clock


class Planted(LoaderModule):
    """Images of which some of the training images, and all others, are turned by a quarter.

    Args:
        source: The images, set up.
        share: Share of the training images that are turned.
        seed: Seed of their choice.

    Attributes:
        planted: Indices of the training images that are turned.
    """

    def __init__(self, source: Any, share: float, seed: int) -> None:
        super().__init__(source.batch_size)
        images, labels = (values.clone() for values in tensors_of(source.train_set))
        # With the seed alone, numpy would draw the samples that a split or wrong labels have drawn.
        order = np.random.default_rng([seed, 2]).permutation(len(labels))
        self.planted = torch.from_numpy(order[: round(share * len(labels))])
        images[self.planted], _ = turned((images[self.planted], labels[self.planted]))
        self.train_set = TensorDataset(images, labels)
        self.val_set = TensorDataset(*turned(tensors_of(source.val_set)))
        self.test_set = TensorDataset(*turned(tensors_of(source.test_dataloader().dataset)))

    @override
    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.val_set, 250)

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the loader of the test set."""
        return DataLoader(self.test_set, 250)


def chosen(prune: float, **options: Any) -> Arm:
    """Return a training that continues with few samples, for as many steps as with all of them."""
    given = {"epoch": OfEpochs(SCORED), "budget": "steps", "figure": False, "num_shown": 0, **options}
    return Arm(Use(DataPruning, prune, **given), module={"optimizer": "adamw", "weight_decay": 0.01})


@dataclass(frozen=True)
class ValidationByClass:
    """The validation images of each class: the mean gradient of all would be that of the hardest classes."""

    def __call__(self, trainer: Trainer) -> list[Subset[Any]]:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        labels = data.val_set.tensors[1]
        chosen = [(labels == label).nonzero().flatten().tolist() for label in range(CLASSES)]
        return [Subset(data.val_set, indices) for indices in chosen if indices]


def targeted(part: str, prune: float) -> Targeted:
    """Return the claim about a part of the data."""
    return Targeted(
        name=f"less-{part}-images",
        text=f"A tenth of the training images is turned, as all test images are: the {part} of the data that LESS chooses is "
        f"better than a random {part}, and than the one that EL2N chooses.",
        paper=Paper(
            "`DataPruning`, score `less`",
            "data_pruning",
            "5 % of the data, chosen by the influence on a target, often trains better for it than all data.",
            "LESS: Selecting Influential Data for Targeted Instruction Tuning (2402.04333)",
        ),
        table={
            "random": chosen(prune, keep="random"),
            "el2n": chosen(prune),
            "less": chosen(prune, score="less", target=ValidationByClass(), checkpoints=2),
        },
        arms=("random", "el2n", "less"),
        reference="random",
        pairs=[("less", "random"), ("less", "el2n")],
        rates=RATES,
        budget=4,
        **IMAGES,
    )


CLAIMS = (targeted("fifth", 0.8), targeted("twentieth", 0.95))
