"""How much the final loss depends on the learning rate: the sensitivity of Wortsman et al."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from typing_extensions import override

from lightning_grad.callbacks import NormClipping, ZLoss
from studies import claim as base
from studies.arms import PLAIN, Arm, Use
from studies.claim import Paper, Run, silent
from studies.common import finish_loggers
from studies.on_task import OnTask, look
from studies.tasks import TASKS


@dataclass(frozen=True)
class Result(base.Result):
    """The result of trainings at several rates.

    Args:
        sensitivity: Mean over the rates of the loss on the test data, at most that of a new module, less the best of them.
        best_loss: The smallest of these losses.
        losses: These losses, by rate.
    """

    sensitivity: float
    best_loss: float
    losses: list[float]


@dataclass(frozen=True, kw_only=True)
class Sensitivity(OnTask):
    """Arms by how little their final loss depends on the rate. A run of this claim trains once at each rate.

    Args:
        swept: Peak learning rates.
    """

    result: ClassVar[type[Any]] = Result
    metric: str = "sensitivity"
    higher: bool = False
    unit: str = "nats"
    chosen_by: str = "sensitivity"
    swept: Sequence[float] = (1e-3, 1e-2, 1e-1)

    @override
    def train(self, run: Run) -> Result:
        """Train at each rate, and compare the losses."""
        losses = []
        for number, rate in enumerate(self.swept, start=1):
            torch.manual_seed(run.seed)  # every rate starts from the same module and sees the same batches
            trainer, module, data, _ = self.fitted(replace(run, rate=rate, show=silent))
            loss, _ = look(trainer, module, data.test_dataloader())
            start, _ = look(trainer, self.untrained(run, data), data.test_dataloader())
            finish_loggers(trainer)
            losses.append(loss if loss < start else start)  # a loss of nan counts as that of a new module, too
            run.show(number / len(self.swept), f"test loss {loss:6.3f} at rate {rate:g}")
        best = min(losses)
        return Result(run.arm, run.seed, run.rate, statistics.mean(losses) - best, best, losses)

    def untrained(self, run: Run, data: Any) -> Any:
        """Return a new module, without a trace in the random numbers."""
        with torch.random.fork_rng():
            torch.manual_seed(run.seed)
            return TASKS[self.task].module(data, None, self.table[run.arm].module)


TABLE = {
    "plain": PLAIN,
    "z-loss": Arm(Use(ZLoss)),
    "norm": Arm(Use(NormClipping, 1.0)),
    "both": Arm(Use(ZLoss), Use(NormClipping, 1.0)),
}
CLAIMS = (
    Sensitivity(
        name="rate-sensitivity-text",
        text="With z-loss, the final loss depends less on the learning rate, with and without norm clipping.",
        paper=Paper(
            "`ZLoss`",
            "clipping",
            "At high rates the output logits drift and the training diverges; z-loss prevents it.",
            "Small-scale proxies for large-scale Transformer training instabilities (2309.14322)",
        ),
        table=TABLE,
        arms=tuple(TABLE),
        reference="plain",
        pairs=[("z-loss", "plain"), ("both", "norm")],
        task="text",
        length=150,
        budget=12,
    ),
)
