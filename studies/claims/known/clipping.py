"""Gradient clipping: at a rate that is too high, and with bad batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_grad.callbacks import AutoClip, MomentumReset, NormClipping, SpikeClipping, ZClip
from studies.arms import PLAIN, Arm, OfSteps, Use
from studies.claim import Paper, Run
from studies.on_task import OnTask
from studies.tasks import TASKS

TABLE = {
    "none": PLAIN,
    "norm": Arm(Use(NormClipping, 1.0)),
    "zclip": Arm(Use(ZClip)),
    "autoclip": Arm(Use(AutoClip)),
    # SPAM is published for long trainings: with a reset every 500 steps, so short a training would have none.
    "spam": Arm(Use(MomentumReset, every_n_steps=OfSteps(0.5), warmup_steps=OfSteps(0.25)), Use(SpikeClipping)),
}
ADAPTIVE = ("zclip", "autoclip", "spam")
PAPER = Paper(
    "`ZClip`, `AutoClip`, `SpikeClipping`",
    "clipping",
    "Limits that follow the training keep spikes from harming it (ZClip: by recent norms; SPAM: by Adam's second moment), "
    "or make it smoother (AutoClip).",
    "ZClip (2504.02507); AutoClip (2007.14469); SPAM (2501.06842)",
)


@dataclass(frozen=True, kw_only=True)
class BadBatches(OnTask):
    """Arms in a training with bad batches.

    Args:
        every: Every so many steps, a batch is bad, from the middle of the first such period on.
        factor: Factor of the inputs of a bad batch, whose labels are also moved to the next class.
    """

    every: int = 100
    factor: float = 100.0

    @override
    def fitted(self, run: Run, first: Sequence[Callback] = ()) -> Any:
        return super().fitted(run, [*first, SpoilBatches(self.every, self.factor)])


class SpoilBatches(Callback):
    """Multiply the images of some batches, and give them the label of the next class.

    Args:
        every: Every so many steps, a batch is bad.
        factor: Factor of the images.
    """

    def __init__(self, every: int, factor: float) -> None:
        self.every = every
        self.factor = factor

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % self.every == self.every // 2:
            images, labels = batch
            images *= self.factor
            labels.copy_(torch.remainder(labels + 1, 10))


def settings(task: str) -> dict[str, Any]:
    """Return what the claims of a task share."""
    return {
        "paper": PAPER,
        "table": TABLE,
        "arms": tuple(TABLE),
        "reference": "none",
        "task": task,
        **TASKS[task].metric,
    }


CLAIMS = (
    OnTask(
        name="clipping-high-rate-text",
        text="At a rate that is too high, clipping by an adaptive limit ends with a lower loss than none or a fixed norm.",
        pairs=[(arm, other) for other in ("none", "norm") for arm in ADAPTIVE],
        length=400,
        rates=(0.02,),
        budget=11,
        **settings("text"),
    ),
    BadBatches(
        name="clipping-bad-batches-images",
        text="With a bad batch every 100 steps, an adaptive limit is more accurate than none or a fixed norm.",
        pairs=[(arm, other) for other in ("none", "norm") for arm in ADAPTIVE],
        rates=(1e-3, 3e-3, 1e-2),
        budget=9,
        **{
            **settings("images"),
            "table": {
                name: Arm(*arm.uses, module={"optimizer": "adamw", "weight_decay": 0.01}) for name, arm in TABLE.items()
            },
        },
    ),
)
