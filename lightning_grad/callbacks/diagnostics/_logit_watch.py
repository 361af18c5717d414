"""Reading the logits of the training steps that are logged, without changing what is computed.

Used by ``gradient_monitor.py``; what is read is in ``_logit_probe.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from lightning_grad.callbacks.diagnostics._constructors import NOT_CONSTRUCTED, constructors_unwatched
from lightning_grad.callbacks.diagnostics._logit_probe import LogitProbe, compiled_graphs
from lightning_grad.utilities.reporting import is_log_step


class LogitWatch:
    """Puts a :class:`~._logit_probe.LogitProbe` around ``training_step`` at log steps.

    Args:
        trainer: The trainer.
        pl_module: A module of which no part is compiled.
        advice: What to do where a step cannot run under the probe.
    """

    def __init__(self, trainer: pl.Trainer, pl_module: pl.LightningModule, advice: str) -> None:
        self._trainer = trainer
        self._module = pl_module
        self._advice = advice
        self._graphs = compiled_graphs()
        self._probe: LogitProbe | None = None

    def around(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a training step, and read its logits if it is logged."""
        # A function that is no module may be compiled too, and would run uncompiled.
        if not is_log_step(self._trainer) or compiled_graphs() > self._graphs:
            return inner(*args, **kwargs)
        self._probe = LogitProbe(self._module)
        try:
            with constructors_unwatched(), self._probe:
                return inner(*args, **kwargs)
        except RuntimeError as error:
            if NOT_CONSTRUCTED in str(error):
                error.add_note(self._advice)
            raise

    def read(self) -> dict[str, Tensor]:
        """Return what was seen since the last batch."""
        return {} if self._probe is None else self._probe.read()

    def forget(self) -> None:
        """Drop what was seen, when a batch is over."""
        self._probe = None
