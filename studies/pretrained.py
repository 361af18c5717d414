"""Claims about fine-tuning: all arms of a seed start from one pretrained model, and train it on few samples of a changed task.

A claim pretrains once for each seed, in the process that needs the model; all its arms then get the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from plain_project.data import LoaderModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset
from typing_extensions import override

from studies.arms import PLAIN
from studies.claim import Run, freeze
from studies.common import Follow
from studies.on_task import FitClock, OnTask
from studies.tasks import CLASSES, TASKS

Samples = tuple[Tensor, Tensor]
_WEIGHTS: dict[str, dict[str, Tensor]] = {}  # of pretrained models, by what they depend on


@dataclass(frozen=True, kw_only=True)
class FromPretrained(OnTask):
    """Arms that start from the same pretrained model of a task.

    Args:
        change: What the pretrained model has to learn. ``"classes"``: it has seen images of the first half of the classes,
            and learns all of them. ``"turned"``: images are turned by a quarter, and a text is read backwards. ``"none"``:
            the same task again.
        before: Length of the pretraining, in the unit of the task.
        samples: Training samples of the arms, the first of the shuffled images, or the first windows of the text.
        model: Arguments of the module that make another network, of the pretraining too.
    """

    choices: ClassVar[Mapping[str, Sequence[str]]] = {**OnTask.choices, "change": ("classes", "turned", "none")}
    change: str = "classes"
    before: int = 8
    samples: int = 500
    model: Mapping[str, Any] = field(default_factory=dict)

    @override
    def check(self) -> None:
        super().check()
        if self.change == "classes" and self.task == "text":
            raise ValueError("change must be turned or none for a text, which has no classes; got 'classes'.")

    @override
    def fitted(self, run: Run, first: Sequence[Callback] = ()) -> tuple[Trainer, LightningModule, Any, FitClock]:
        """Train from the pretrained weights; see :class:`OnTask`."""
        arm, task, clock = self.table[run.arm], TASKS[self.task], FitClock()
        weights, source = self.pretrained(run), self.source(run.seed)
        seed_everything(run.seed, verbose=False)  # an arm must not depend on whether it is the one that pretrained
        data = self.tuning_data(source)
        limits, length = self.limits(arm, len(data.train_dataloader()))
        follow = Follow(run.show, "val_acc" if task.metric["scale"] == 100 else "val_loss")
        callbacks = [clock, follow, *first, *arm.build(length)]
        trainer = self.trainer(run, callbacks, **{**limits, **self.few, **arm.trainer})
        module = task.module(source, run.rate, {**self.model, **arm.module})
        module.load_state_dict(weights)
        trainer.fit(module, data)
        return trainer, module, data, clock

    def pretrained(self, run: Run) -> dict[str, Tensor]:
        """Return the weights from which the arms of a seed start; a process trains them once, also for several claims."""
        settings = {name: value for name, value in self.settings.items() if name != "length"}  # of the arms
        words = freeze({**settings, "seed": run.seed, "device": self.device, "folder": self.data})
        if words not in _WEIGHTS:
            seed_everything(run.seed, verbose=False)
            source = self.source(run.seed)
            data = self.pretraining_data(source)
            limits, _ = replace(self, length=self.before).limits(PLAIN, len(data.train_dataloader()))
            module = TASKS[self.task].module(source, None, self.model)
            trainer = self.trainer(Run("pretrained", run.seed), [], **{**limits, **self.few, "limit_val_batches": 0})
            trainer.fit(module, data)
            _WEIGHTS[words] = {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}
        return _WEIGHTS[words]

    def source(self, seed: int) -> Any:
        """Return the data of the task, set up."""
        data = TASKS[self.task].data(self.data, seed, self.flip)
        data.setup("fit")
        return data

    def pretraining_data(self, source: Any) -> Data:
        """Return the data of the pretraining."""
        half = self.change == "classes"
        return Data(source, lambda samples: of_classes(samples, CLASSES // 2) if half else samples)

    def tuning_data(self, source: Any) -> Data:
        """Return the data of the arms."""
        turn = turned if self.change == "turned" else (lambda samples: samples)
        return Data(source, turn, self.samples)

    @property
    def few(self) -> dict[str, Any]:
        """The arguments of the Trainer for a quick look."""
        return dict.fromkeys(("limit_train_batches", "limit_val_batches"), self.limit_batches)


class Data(LoaderModule):
    """Changed samples of other data.

    Args:
        source: The other data, set up.
        change: Function of inputs and targets that returns others.
        samples: How many of the training samples to keep; ``None`` for all.
    """

    def __init__(self, source: Any, change: Callable[[Samples], Samples], samples: int | None = None) -> None:
        super().__init__(source.batch_size)
        inputs, targets = tensors_of(source.train_set)
        self.train_set = TensorDataset(*change((inputs[:samples], targets[:samples])))
        self.val_set = TensorDataset(*change(tensors_of(source.val_set)))
        self.test_set = TensorDataset(*change(tensors_of(source.test_dataloader().dataset)))

    @override
    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.val_set, 250)

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the loader of the test set."""
        return DataLoader(self.test_set, 250)


def tensors_of(dataset: Dataset[Any]) -> Samples:
    """Return all inputs and targets of a data set."""
    inputs, targets = next(iter(DataLoader(dataset, len(dataset))))  # type: ignore[arg-type]
    return inputs, targets


def of_classes(samples: Samples, count: int) -> Samples:
    """Return the samples of the first classes.

    Example:
        >>> import torch
        >>> of_classes((torch.tensor([0.1, 0.2, 0.3]), torch.tensor([1, 2, 0])), 2)
        (tensor([0.1000, 0.3000]), tensor([1, 0]))
    """
    inputs, targets = samples
    chosen = targets < count
    return inputs[chosen], targets[chosen]


def turned(samples: Samples) -> Samples:
    """Return images ``(n, channels, height, width)`` turned by a quarter, or windows of a text ``(n, length)`` backwards.

    Example:
        >>> import torch
        >>> turned((torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]])))  # the window 1 2 3 4
        (tensor([[4, 3, 2]]), tensor([[3, 2, 1]]))
    """
    inputs, targets = samples
    if inputs.ndim == 4:
        return inputs.rot90(1, (2, 3)), targets
    return targets.flip(1), inputs.flip(1)
