"""What fits left behind, for checks to look at."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_grad.testing.states import state_of
from lightning_grad.testing.traces import traces, trainer_traces
from lightning_grad.testing.watching import Saver, Watch


class Run:
    """What a fit left behind; to be made when the fit has ended, before random numbers are drawn.

    Args:
        trainer: The trainer of the fit.
        module: The module.
        callbacks: The callback under test; empty for the run without one.
        states: The states of the callbacks.
        warned: The text of each warning.
        start: State dict of the module before the fit.
    """

    def __init__(
        self,
        trainer: Any,
        module: Any,
        callbacks: list[Any],
        states: list[Any],
        warned: list[str],
        start: dict[str, Tensor] | None = None,
    ) -> None:
        self.trainer, self.module, self.callbacks, self.warned, self.start = trainer, module, callbacks, warned, start
        state = {**state_of(trainer, module), "steps": trainer.global_step}
        self.left: dict[str, Any] = {**copy.deepcopy(state), "callbacks": states}
        """All that must be bitwise the same if the run is repeated."""
        self.traces = {"module": traces(module), "trainer": trainer_traces(trainer)}  # a later fit may tidy up

    @property
    def weights(self) -> dict[str, Tensor]:
        """State dict of the module after the fit."""
        return self.left["module"]  # type: ignore[no-any-return]

    @property
    def metrics(self) -> dict[str, Any]:
        """The last logged values."""
        return dict(self.trainer.callback_metrics)

    @property
    def moved(self) -> bool:
        """Whether a weight or buffer changed in the fit."""
        start = self.start or {}
        return any(
            not torch.equal(value, start[name].to(value)) for name, value in self.weights.items() if name in start
        )


class Watched(Run):
    """What a fit left behind that was looked at at every step, and saved."""

    watch: Watch
    folder: Path
    savers: list[Saver]

    def saved(self, kind: str) -> dict[int, Path]:
        """Return the checkpoints of one kind by their step.

        Args:
            kind: ``"steps"``, every second step; ``"epochs"``, after the validation of every epoch; ``"weights"``, the same
                without optimizers.

        Raises:
            Exception: The error of saving, if there was one.
        """
        for saver in self.savers:
            saver.raise_error()
        paths = [path for path in (self.folder / kind).glob("*.ckpt") if path.stem != "last"]
        return dict(sorted((int(path.stem.split("step=")[1]), path) for path in paths))


class Broken(Run):
    """What a fit left behind that was broken off."""

    saved: dict[str, dict[str, Any]]
    """The checkpoints that an exception led to, by who wrote them."""
