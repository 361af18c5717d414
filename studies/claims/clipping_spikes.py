"""Clipping at a learning rate where the loss spikes by itself.

The plain project's character transformer, with one layer, learns a text of sums ("27 + 58 =  85") with AdamW, at eight
times its usual learning rate, which stays high after a warm-up. Each rule is one line in :data:`RULES`; everything else
here measures.

Why sums: all batches are alike, so the loss is smooth and a spike stands out, and the model easily forgets how to carry
digits. On the source code that ``Text`` reads by default, so small a model did not spike at any rate we tried. A rounding
difference soon changes the whole training, so trust several seeds, not one.
"""

from __future__ import annotations

import os
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from lightning.pytorch import Callback, LightningModule
from plain_project import CharTransformer, Text
from typing_extensions import override

from lightning_grad.callbacks import AdaptiveGradientClipping, AutoClip, MomentumReset, SpikeClipping, ZClip
from studies import claim as base
from studies.claim import Claim, Paper, Run
from studies.common import Follow, GradientRecorder, finish_loggers

LINE = len("27 + 58 =  85\n")
WARMUP = 0.1
SHORTEST = 1000  # characters of a text whose last tenth has a window for validation
EVALUATIONS, LAST_EVALUATIONS, VALIDATION_BATCHES = 8, 3, 5
WINDOW, DEVIATIONS, FLOOR = 50, 4.0, 0.02

# The line in Trainer(callbacks=[...]) of each variant, by the number of training steps.
RULES: dict[str, Callable[[int], list[Callback]]] = {
    "none": lambda steps: [],
    "trainer": lambda steps: [],  # Trainer(gradient_clip_val=1.0)
    "zclip": lambda steps: [ZClip()],
    "zclip-bounded": lambda steps: [ZClip(max_norm=1.0)],  # as published
    "autoclip": lambda steps: [AutoClip()],
    "agc": lambda steps: [AdaptiveGradientClipping()],
    # SPAM is published for long trainings: with a reset every 500 steps, this short training would have none.
    "spam": lambda steps: [MomentumReset(every_n_steps=max(1, steps // 2), warmup_steps=steps // 4), SpikeClipping()],
}


@dataclass(frozen=True)
class Result(base.Result):
    """The result of one training; the arm is the rule, see :data:`RULES`.

    Args:
        validation_loss: Median over the last three validations.
        spikes: Number of spikes of the training loss, see :func:`find_spikes`.
        steps_lost: Number of steps until the loss recovered from them.
        clipped_share: Share of steps whose gradients were changed before the optimizer used them.
    """

    validation_loss: float
    spikes: int
    steps_lost: int
    clipped_share: float


@dataclass(frozen=True, kw_only=True)
class Spikes(Claim[Result]):
    """Clipping rules at a learning rate where the loss spikes.

    Args:
        steps: Optimizer steps of each training.
    """

    result = Result
    reads = f"a UTF-8 text of at least {SHORTEST} characters"
    name: str = "clipping-spikes"
    text: str = (
        "Where the loss spikes, each way to clip, with a fixed or an adaptive limit, ends with a lower loss than none."
    )
    arms: Sequence[str] = tuple(RULES)
    reference: str = "none"
    metric: str = "validation_loss"
    higher: bool = False
    rates: Sequence[float] = (0.04,)  # after the warm-up; the claim is about this rate, so there is no choice
    chosen_by: str = "validation_loss"
    budget: float = 1.5
    steps: int = 350

    @override
    def check(self) -> None:
        super().check()
        try:
            length = len(self.data.read_text(encoding="utf-8")) if self.data else SHORTEST
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read {self.data} as UTF-8 text: {error}") from error
        if length < SHORTEST:
            raise ValueError(f"{self.data} must have at least {SHORTEST} characters; got {length}.")

    @override
    def train(self, run: Run) -> Result:
        """Run one training, and find its spikes."""
        data, recorder = read_text(self), GradientRecorder("val_loss")
        steps = self.steps
        trainer = self.trainer(
            run,
            [recorder, Follow(run.show, "val_loss"), *RULES[run.arm](steps)],
            gradient_clip_val=1.0 if run.arm == "trainer" else None,
            max_steps=steps,
            val_check_interval=max(1, steps // EVALUATIONS),
            check_val_every_n_epoch=None,
            limit_val_batches=VALIDATION_BATCHES,
            log_every_n_steps=max(1, min(5, steps // 40)),
        )
        trainer.fit(build_module(data, run.rate), data)
        finish_loggers(trainer)
        recorder.write(self.folder(run) / "steps.csv")
        return measure(run, recorder)


def measure(run: Run, recorder: GradientRecorder) -> Result:
    """Compute the result of a training from the record."""
    spikes = find_spikes(recorder.losses)
    return Result(
        run.arm,
        run.seed,
        run.rate,
        validation_loss=statistics.median(recorder.validations[-LAST_EVALUATIONS:]),
        spikes=len(spikes),
        steps_lost=sum(lost for _, lost in spikes),
        clipped_share=float(np.mean(recorder.clipped)),
    )


def read_text(claim: Spikes) -> Text:
    """Return the text of the claim; each window of the sums is one sum."""
    if claim.data:
        return Text(claim.data, context=64, batch_size=8)
    return Text(write_sums(claim.output / "sums.txt"), context=LINE, batch_size=24)


def write_sums(path: Path, lines: int = 20_000) -> Path:
    """Write a text of sums of two numbers below 100, unless it is there. The text is always the same."""
    if not path.exists():
        numbers = random.Random(0)
        pairs = [(numbers.randrange(100), numbers.randrange(100)) for _ in range(lines)]
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(f".{os.getpid()}")
        new.write_text("".join(f"{a:2} + {b:2} = {a + b:3}\n" for a, b in pairs), encoding="utf-8")
        new.replace(path)  # at once, because another process may read it
    return path


def build_module(data: Text, rate: float | None) -> LightningModule:
    """Return a new module of the plain project."""
    lr = Spikes.rates[0] if rate is None else rate
    return CharTransformer(data.vocabulary_size, data.context, depth=1, lr=lr, schedule="warmup", warmup=WARMUP)


def find_spikes(losses: Sequence[float]) -> list[tuple[int, int]]:
    """Find the spikes of a training loss, and their lengths.

    A spike is a step whose loss exceeds the median of the 50 steps before it by more than 4 robust deviations. A robust
    deviation is 1.4826 times the median distance of those 50 losses from their median, and at least 0.02. The spike lasts
    until the loss is below that median again, or the training ends; no other spike is counted meanwhile. A nan loss
    always counts as a spike. The first 50 steps are ignored.

    Args:
        losses: Loss of every step.

    Returns:
        list: The step of each spike, counted from 0, and its length in steps.
    """
    values, spikes, step = np.nan_to_num(np.asarray(losses, dtype=float), nan=np.inf, posinf=np.inf), [], WINDOW
    while step < len(values):
        before = values[step - WINDOW : step]
        median = np.median(before)
        deviation = max(1.4826 * float(np.median(np.abs(before - median))), FLOOR)
        if values[step] <= median + DEVIATIONS * deviation:
            step += 1
            continue
        back = np.flatnonzero(values[step:] < median)
        lost = int(back[0]) if len(back) else len(values) - step
        spikes.append((step, lost))
        step += lost
    return spikes


CLAIMS = (
    Spikes(
        default_data="sums",
        paper=Paper(
            "ZClip",
            "clipping",
            "A limit that follows the recent gradient norms prevents spikes of the loss",
            "ZClip (2504.02507)",
        ),
    ),
)
