"""Clipping in a training with one bad batch: which rules save the run, and which do not.

Three linear layers learn handwritten digits. In the middle of the training, one image of a batch is multiplied by 1000 and
carries a wrong label, as a corrupt record would. Each rule is one line in :data:`RULES`; everything else here measures.
``clipping_spikes.py`` compares the rules in a training whose loss spikes by itself.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from plain_project import Digits, ImageClassifier
from typing_extensions import override

from lightning_grad.callbacks import (
    AdaptiveGradientClipping,
    AutoClip,
    GradientCentralization,
    LayerwiseClipping,
    NormClipping,
    SkipNonFinite,
    SpikeClipping,
    ValueClipping,
    ZClip,
)
from studies import claim as base
from studies.claim import Claim, Run
from studies.common import Follow, GradientRecorder, finish_loggers, linear_network

IN_THE_DEMO = """\
Clipped gradients (half a minute). A small network learns handwritten digits.
In the middle of the training, one image of one batch is multiplied by 1000 and
has a wrong label. Each rule is one line, and some of them do not help:

    Trainer(callbacks=[NormClipping(1.0)])
"""

WIDTH, CLASSES = 128, 10
BEFORE, TWICE, HALF = 50, 2.0, 0.5  # steps that define the usual loss, limit of its multiple, least accuracy


@dataclass(frozen=True)
class Rule:
    """A rule, as in the list of callbacks.

    Args:
        text: The call, for titles; AGC stands for AdaptiveGradientClipping.
        build: Function that returns the callbacks.
    """

    text: str
    build: Callable[[], list[Callback]]


# The line in Trainer(callbacks=[...]) of each variant.
RULES = {
    "none": Rule("no rule", list),
    "norm": Rule("NormClipping(1.0)", lambda: [NormClipping(1.0)]),
    "layerwise": Rule("LayerwiseClipping(1.0)", lambda: [LayerwiseClipping(1.0)]),
    "zclip": Rule("ZClip()", lambda: [ZClip()]),
    "autoclip": Rule("AutoClip()", lambda: [AutoClip()]),
    "value": Rule("ValueClipping(1.0)", lambda: [ValueClipping(1.0)]),
    "agc": Rule("AGC(0.1)", lambda: [AdaptiveGradientClipping(0.1)]),
    "agc-head": Rule("AGC(0.1, head=None)", lambda: [AdaptiveGradientClipping(0.1, head=None)]),
    "centralization": Rule("GradientCentralization()", lambda: [GradientCentralization()]),
    "skip": Rule("SkipNonFinite()", lambda: [SkipNonFinite()]),
    "spike": Rule("SpikeClipping()", lambda: [SpikeClipping()]),
}
NEEDS_ADAM = "spike"  # it compares a gradient with Adam's second moment
LIMITS = ("norm", "layerwise", "zclip", "autoclip", "agc-head", "spike")  # of a norm, over all layers


@dataclass(frozen=True)
class Result(base.Result):
    """The result of one training; the arm is the rule, see :data:`RULES`.

    Args:
        usual_norm: Median gradient norm of the 50 steps before the bad batch, before the rule acts.
        bad_norm: Gradient norm of the bad batch, before the rule acts.
        used_norm: Gradient norm of the bad batch after the rule acts.
        accuracy_before: Validation accuracy just before the bad batch.
        accuracy: Validation accuracy at the end.
        steps_lost: Steps after the bad batch whose loss is nan or more than twice the largest of the 50 before it.
        outcome: ``"saved"``, ``"damaged"`` or ``"lost"``, see :func:`judge`.
    """

    usual_norm: float
    bad_norm: float
    used_norm: float
    accuracy_before: float
    accuracy: float
    steps_lost: int
    outcome: str


@dataclass(frozen=True, kw_only=True)
class BadBatch(Claim[Result]):
    """Clipping rules in a training with one bad batch.

    Args:
        optimizer: ``"sgd"`` or ``"adamw"``.
        factor: Factor of the bad image; nan is possible.
        steps: Optimizer steps of each training.
    """

    result = Result
    choices: ClassVar = {"optimizer": ("sgd", "adamw")}
    least: ClassVar = {"steps": 4}  # a batch, a validation and the bad batch in the middle
    name: str = "clipping"
    text: str = "With one bad batch in the training, a limit on the gradient norm saves the accuracy."
    arms: Sequence[str] = tuple(name for name in RULES if name != NEEDS_ADAM)
    reference: str = "none"
    metric: str = "accuracy"
    margin: float = 0.05
    scale: float = 100
    unit: str = "%"
    chosen_by: str = "accuracy"
    budget: float = 0.5
    optimizer: str = "sgd"
    factor: float = 1000.0
    steps: int = 220

    @property
    def bad_step(self) -> int:
        """The step of the bad batch, counted from 0."""
        return self.steps // 2

    @property
    @override
    def known(self) -> list[str]:
        return [name for name in RULES if name != NEEDS_ADAM or self.optimizer == "adamw"]

    @override
    def comparisons(self) -> list[tuple[str, str]]:
        """Compare the rules that limit a norm; the others are there to see how much the limit matters."""
        return [(arm, self.reference) for arm in self.arms if arm in LIMITS]

    @override
    def train(self, run: Run) -> Result:
        """Run one training with one bad batch, and write ``steps.csv``."""
        recorder = GradientRecorder("val_acc")
        bad, follow = BadBatchAt(self.bad_step, self.factor), Follow(run.show)
        validate = {"val_check_interval": self.bad_step, "check_val_every_n_epoch": None, "log_every_n_steps": 5}
        callbacks = [bad, recorder, follow, *RULES[run.arm].build()]
        trainer = self.trainer(run, callbacks, max_steps=self.steps, **validate)
        trainer.fit(build_module(self.optimizer, run.rate), Digits(seed=run.seed))
        finish_loggers(trainer)
        recorder.write(self.folder(run) / "steps.csv")
        return measure(run, recorder, self.bad_step)


def build_module(optimizer: str, rate: float | None = None) -> LightningModule:
    """Return a new module of the plain project."""
    rate = rate or {"sgd": 0.05, "adamw": 3e-3}[optimizer]
    chosen: Any = optimizer
    return ImageClassifier(linear_network(WIDTH), optimizer=chosen, lr=rate, schedule="constant")


class BadBatchAt(Callback):
    """Corrupt the first sample of one batch: multiply the image by a factor and change the label to the next class.

    The label must be wrong: a network of linear layers and ReLU tends to classify a multiple of an image like the image,
    so with the right label the sample would do no harm.

    Args:
        step: Step of the batch, counted from 0.
        factor: Factor of the image.
    """

    def __init__(self, step: int, factor: float) -> None:
        self.step, self.factor = step, factor

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            images, labels = batch
            images[0] *= self.factor
            labels[0] = (labels[0] + 1) % CLASSES


def measure(run: Run, recorder: GradientRecorder, bad: int) -> Result:
    """Compute the result of a training from the record."""
    lost = count_lost(recorder.losses, bad)
    return Result(
        run.arm,
        run.seed,
        run.rate,
        usual_norm=statistics.median(recorder.norms[max(0, bad - BEFORE) : bad]),
        bad_norm=recorder.norms[bad],
        used_norm=recorder.norms_used[bad],
        accuracy_before=recorder.validations[0],
        accuracy=recorder.validations[-1],
        steps_lost=lost,
        outcome=judge(lost, recorder.validations[-1]),
    )


def count_lost(losses: Sequence[float], bad: int) -> int:
    """Count the steps after the bad one whose loss is nan or more than twice the largest of the 50 before it.

    Args:
        losses: Loss of every step.
        bad: The bad step, counted from 0.
    """
    limit = TWICE * max(losses[max(0, bad - BEFORE) : bad])
    return sum(not loss <= limit for loss in losses[bad + 1 :])


def judge(steps_lost: int, accuracy: float) -> str:
    """Return the outcome of a training: lost below half accuracy at the end, else damaged if steps are lost, else saved.

    Example:
        >>> judge(0, 0.97), judge(40, 0.95), judge(120, 0.1)
        ('saved', 'damaged', 'lost')
    """
    if accuracy < HALF:
        return "lost"
    return "damaged" if steps_lost else "saved"


CLAIMS = (
    BadBatch(about=("NormClipping", "LayerwiseClipping", "ZClip", "AutoClip", "AdaptiveGradientClipping")),
    BadBatch(
        name="clipping-adamw",
        text="With AdamW and one bad batch, clipping costs at most one point of accuracy; the run recovers without it, too.",
        about=("NormClipping", "SpikeClipping"),
        arms=("none", "norm", "spike"),
        margin=-0.01,
        optimizer="adamw",
        budget=0.2,
    ),
)
