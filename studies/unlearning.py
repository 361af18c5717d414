"""Claims about unlearning: a trained model forgets some of its samples, next to a model that was trained without them.

Both a model of all samples, from which the arms start, and the model without the samples to forget are trained once for each
seed, in the process that needs them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from studies import claim as base
from studies.claim import Run
from studies.common import finish_loggers
from studies.on_task import look
from studies.pretrained import Data, FromPretrained, tensors_of
from studies.tasks import TASKS


@dataclass(frozen=True)
class Result(base.Result):
    """The accuracies of a model that forgot, and of the retrained model.

    Args:
        gap: Mean absolute difference to the retrained model, over the accuracies on the samples to forget, on those to
            retain, and on test data.
        validation_gap: The same, with validation data in place of test data; rates are chosen by it.
        start_gap: ``gap`` of the model before it forgets.
        forget_accuracy: Accuracy on the samples to forget.
        retain_accuracy: Accuracy on the samples to retain.
        test_accuracy: Accuracy on test data.
        retrained_forget_accuracy: ``forget_accuracy`` of the retrained model.
        retrained_retain_accuracy: ``retain_accuracy`` of the retrained model.
        retrained_test_accuracy: ``test_accuracy`` of the retrained model.
        steps: Optimizer steps of the unlearning.
    """

    gap: float
    validation_gap: float
    start_gap: float
    forget_accuracy: float
    retain_accuracy: float
    test_accuracy: float
    retrained_forget_accuracy: float
    retrained_retain_accuracy: float
    retrained_test_accuracy: float
    steps: int


@dataclass(frozen=True, kw_only=True)
class Unlearned(FromPretrained):
    """Arms that forget the first samples of the training set of a trained model.

    Args:
        forgotten: Number of samples to forget.
        skipped: Number of samples that the pretraining lacks: ``forgotten`` for the retrained model.
    """

    result: ClassVar[type[Any]] = Result
    change: str = field(default="none")
    least: ClassVar[Mapping[str, int]] = {"skipped": 0}
    forgotten: int = 50
    skipped: int = 0

    @override
    def train(self, run: Run) -> Result:
        """Forget, and compare the model with the retrained one."""
        retrained = self.accuracies(run, replace(self, skipped=self.forgotten).pretrained(run))
        start = self.accuracies(run, self.pretrained(run))
        trainer, module, _, _ = self.fitted(run)
        finish_loggers(trainer)
        own = self.measured(trainer, module, run)
        return Result(
            run.arm,
            run.seed,
            run.rate,
            gap_of(own, retrained, "test"),
            gap_of(own, retrained, "validation"),
            gap_of(start, retrained, "test"),
            own["forget"],
            own["retain"],
            own["test"],
            retrained["forget"],
            retrained["retain"],
            retrained["test"],
            trainer.global_step,
        )

    def accuracies(self, run: Run, weights: dict[str, Any]) -> dict[str, float]:
        """Return the accuracies of a model with given weights."""
        module = TASKS[self.task].module(self.source(run.seed), None, self.model)
        module.load_state_dict(weights)
        return self.measured(self.trainer(run, [], logger=False), module, run)

    def measured(self, trainer: Trainer, module: LightningModule, run: Run) -> dict[str, float]:
        """Return the accuracies of a model on the samples to forget and to retain, and on validation and test data."""
        data = self.tuning_data(self.source(run.seed))
        inputs, targets = tensors_of(data.train_set)
        forget, retain = slice(None, self.forgotten), slice(self.forgotten, None)
        parts = {
            "forget": DataLoader(TensorDataset(inputs[forget], targets[forget]), 250),
            "retain": DataLoader(TensorDataset(inputs[retain], targets[retain]), 250),
            "validation": data.val_dataloader(),
            "test": data.test_dataloader(),
        }
        return {name: look(trainer, module, loader)[1] for name, loader in parts.items()}

    @override
    def pretraining_data(self, source: Any) -> Data:
        return Data(source, lambda samples: (samples[0][self.skipped :], samples[1][self.skipped :]), self.samples)


def gap_of(own: dict[str, float], other: dict[str, float], unseen: str) -> float:
    """Return the mean absolute difference of accuracies.

    Example:
        >>> gap_of({"forget": 0.5, "retain": 1.0, "test": 0.75}, {"forget": 0.75, "retain": 1.0, "test": 0.25}, "test")
        0.25
    """
    return sum(abs(own[name] - other[name]) for name in ("forget", "retain", unseen)) / 3
