"""Claims of papers on the shared tasks: arms are data, and one training serves all of them."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from studies import claim as base
from studies.arms import Arm, Length
from studies.claim import Claim, Run
from studies.common import Follow, finish_loggers
from studies.tasks import TASKS

ON_PURPOSE = "keeps only the hardest"  # warnings about mistakes that claims compare with what is better


@dataclass(frozen=True)
class Result(base.Result):
    """The result of one training on a task.

    Args:
        validation_loss: Loss on the validation data at the end.
        validation_accuracy: Accuracy on the validation data at the end, of images or of next characters.
        test_loss: Loss on the test data.
        test_accuracy: Accuracy on the test data.
        steps: Optimizer steps.
        cpu_seconds: Processor time of the fit without validation, with all that the technique does in it.
    """

    validation_loss: float
    validation_accuracy: float
    test_loss: float
    test_accuracy: float
    steps: int
    cpu_seconds: float


@dataclass(frozen=True, kw_only=True)
class OnTask(Claim[Any]):
    """Arms on a shared task, each at its own rate of the same grid.

    Args:
        table: The arms by name.
        pairs: Pairs of an arm and the arm with which it is compared; by default each arm with the reference.
        task: ``"images"`` or ``"text"``.
        length: Epochs of each training on images, optimizer steps of each training on a text.
        flip: Share of the training labels that are replaced by another class; images only.
        limit_batches: Number of batches in an epoch, for a quick look.
    """

    result: ClassVar[type[Any]] = Result
    reads: ClassVar[str] = "a folder with CIFAR-10 and the text"
    choices: ClassVar[Mapping[str, Sequence[str]]] = {"task": tuple(TASKS)}
    table: Mapping[str, Arm] = field(metadata={"setting": False})
    pairs: Sequence[tuple[str, str]] | None = field(default=None, metadata={"setting": False})
    task: str = "images"
    length: int = 8
    flip: float = 0.0
    limit_batches: int | None = None

    @override
    def check(self) -> None:
        super().check()
        if self.data:
            TASKS[self.task].check(self.data)

    @property
    @override
    def known(self) -> list[str]:
        return list(self.table)

    @property
    @override
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "data": TASKS[self.task].name(self.data)}

    @override
    def settings_of(self, arm: str) -> dict[str, Any]:
        return {**self.settings, "arm": str(self.table[arm])}

    @override
    def code_roots(self) -> Sequence[Any]:
        return [each for arm in self.arms for each in self.table[arm].classes]

    @override
    def comparisons(self) -> list[tuple[str, str]]:
        if self.pairs is None:
            return super().comparisons()
        return [pair for pair in self.pairs if set(pair) <= set(self.arms)]

    @override
    def train(self, run: Run) -> Any:
        """Run one training, and test the module that remains."""
        trainer, module, data, clock = self.fitted(run)
        validation, tested = (
            look(trainer, module, loader) for loader in (data.val_dataloader(), data.test_dataloader())
        )
        finish_loggers(trainer)
        return Result(run.arm, run.seed, run.rate, *validation, *tested, trainer.global_step, clock.seconds)

    def fitted(self, run: Run, first: Sequence[Callback] = ()) -> tuple[Trainer, LightningModule, Any, FitClock]:
        """Train, and return the Trainer, the module, the data and the clock.

        Args:
            run: The training.
            first: Callbacks of the claim, which come before those of the arm.
        """
        warnings.filterwarnings("ignore", f".*({ON_PURPOSE})")
        arm, task, clock = self.table[run.arm], TASKS[self.task], FitClock()
        data = task.data(self.data, run.seed, self.flip)
        data.setup("fit")
        limits, length = self.limits(arm, len(data.train_dataloader()))
        follow = Follow(run.show, "val_acc" if task.metric["scale"] == 100 else "val_loss")
        callbacks = [clock, follow, *first, *arm.build(length)]
        batches: dict[str, Any] = dict.fromkeys(("limit_train_batches", "limit_val_batches"), self.limit_batches)
        trainer = self.trainer(run, callbacks, **{**limits, **batches, **arm.trainer})
        module = task.module(data, run.rate, arm.module)
        trainer.fit(module, data)
        return trainer, module, data, clock

    def limits(self, arm: Arm, batches: int) -> tuple[dict[str, Any], Length]:
        """Return the arguments of the Trainer that end and validate a training of an arm, and its length.

        Args:
            arm: The arm.
            batches: Batches in an epoch of the data.
        """
        batches, length = self.limit_batches or batches, round(self.length * arm.longer)
        every = max(1, length // TASKS[self.task].validations)
        if TASKS[self.task].unit == "epochs":
            return {"max_epochs": length, "check_val_every_n_epoch": every}, Length(length * batches, length)
        limits = {"max_steps": length, "val_check_interval": every, "check_val_every_n_epoch": None}
        return limits, Length(length, math.ceil(length / batches))


def look(trainer: Trainer, module: LightningModule, loader: Any) -> tuple[float, float]:
    """Return the loss and the accuracy of a module on some data."""
    (found,) = trainer.validate(module, loader, verbose=False)
    return found["val_loss"], found["val_acc"]


class FitClock(Callback):
    """Adds up the processor time of a fit without its validations.

    Must be first in the list. What Lightning does once, before the first and after the last epoch, does not count; what a
    technique does between the epochs counts.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._start = 0.0

    @override
    def on_train_start(self, *args: Any) -> None:
        self._start = time.process_time()

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self.seconds += time.process_time() - self._start

    @override
    def on_validation_end(self, *args: Any) -> None:
        self._start = time.process_time()

    @override
    def on_train_end(self, *args: Any) -> None:
        self.seconds += time.process_time() - self._start
