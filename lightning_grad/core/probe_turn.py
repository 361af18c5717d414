"""One look of a probe: it runs in a quiet module on the ranks that look, and all ranks learn how it ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_grad.core.probe_reading import Reading, numbers_of
from lightning_grad.core.probe_samples import ProbeLook, ProbeSamples
from lightning_grad.core.quiet import quiet
from lightning_grad.core.undo import UndoList


@dataclass
class Outcome:
    """How a look ended.

    Args:
        numbers: The scalars, the same on all ranks; ``None`` after an error.
        reading: All that was found, on a rank that has looked.
        error: What this rank raised.
        fault: What any rank raised, in words; empty if none did.
        is_fatal: Whether the module is not what it was before.
    """

    numbers: Mapping[str, float] | None = None
    reading: Reading | None = None
    error: Exception | None = None
    fault: str = ""
    is_fatal: bool = False

    def shared(self, trainer: pl.Trainer, on_all: bool) -> Outcome:
        """Return the outcome with what all ranks must agree about; to be called on every rank.

        Args:
            trainer: The trainer.
            on_all: Whether all ranks have looked, or only the first.
        """
        numbers, fault, is_fatal = trainer.strategy.broadcast((self.numbers, self.fault, self.is_fatal))
        if on_all and trainer.strategy.reduce_boolean_decision(bool(self.fault), all=False):
            fault = self.fault or fault or "That rank shows the error."
        return Outcome(None if fault else numbers, self.reading, self.error, fault, is_fatal or self.is_fatal)


def take_look(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    samples: ProbeSamples,
    probe: Callable[[ProbeLook], Reading],
    due: Mapping[str, int],
) -> Outcome:
    """Run a probe once and leave no trace of it."""
    outcome, undo = Outcome(), UndoList()
    try:
        # Outside of inference mode, in which a user may have Lightning validate: nothing made there has a gradient.
        with torch.inference_mode(False), torch.no_grad(), _prepared(trainer, pl_module, samples):
            try:
                with samples.kept():
                    look = samples.look(pl_module, due["epoch"], due["step"], undo)
                    outcome.reading = probe(look)
                    outcome.numbers = numbers_of(outcome.reading, samples.asked.label)
            except Exception as error:
                outcome.error = error
            finally:
                undo.run()
    except Exception as error:  # from what puts the module back
        outcome.error, outcome.is_fatal = error, True
    if outcome.error is not None:
        outcome.fault = f"{type(outcome.error).__name__}: {outcome.error}"
    return outcome


@contextmanager
def _prepared(trainer: pl.Trainer, pl_module: pl.LightningModule, samples: ProbeSamples) -> Iterator[None]:
    """Make the module quiet, in the precision of the run, and in the stage that the samples belong to."""
    stage = trainer.state.stage
    with quiet(trainer, pl_module, label=samples.asked.label), trainer.precision_plugin.forward_context():
        if samples.split == "train":  # hooks of the module may ask which stage a batch is of
            trainer.training = True
        else:
            trainer.validating = True
        try:
            yield
        finally:
            trainer.state.stage = stage


@contextmanager
def averaged_weights(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[None]:
    """Put the weights into the module that a validation sees with Lightning's weight averaging."""
    callbacks: list[Any] = [
        callback
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if hasattr(callback, "_swap_models") and getattr(callback, "_average_model", None) is not None
    ]
    for callback in callbacks:
        callback._swap_models(pl_module)
    try:
        yield
    finally:
        for callback in reversed(callbacks):
            callback._swap_models(pl_module)
