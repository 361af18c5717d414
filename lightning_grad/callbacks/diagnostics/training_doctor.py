"""Which callback slows the training: the callback.

Its parts: ``_doctor_watch.py`` wraps what it watches, ``_owner_stack.py`` adds up times,
``_host_events.py`` counts host syncs and memory, ``_doctor_table.py`` writes and draws the table.
"""

import contextlib
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_grad.callbacks.diagnostics._doctor_table import draw, rows_of, text_of
from lightning_grad.callbacks.diagnostics._doctor_watch import RECORDED, SKIPPED, Watch
from lightning_grad.core import GradCallback, check_count, during_fit, until_next_fit
from lightning_grad.core.compatibility import Compatibility, yes
from lightning_grad.utilities.reporting import log_figure, log_summary, log_table, output_file, tolerated


class TrainingDoctor(GradCallback):
    r"""Show which callback slows the training: time, host syncs and memory of each, in the first batches of a fit.

    It times the hooks of all callbacks, of any origin, and the parts of the step. Then it prints one
    table and stops watching. It changes nothing.

    Args:
        batches: Number of batches to time. They follow one batch that is skipped and two whose syncs are counted.
            The default equals the default of log_every_n_steps, so one of them is a log step.
        host_syncs: Count host syncs and memory in two batches, with torch's profiler.
            Set it to False if your own code starts that profiler in these batches: only one can run.
        figure: Draw the table at the end of the run. Needs matplotlib and a logger with a folder.
        name: Name of this instance; part of state and log keys.

    Raises:
        ValueError: In the constructor for numbers out of range. In ``setup`` if the Trainer has two.

    **What is measured.** The host's time from loading a batch to the end of ``on_train_batch_end``,
    divided among the callbacks and the parts of the step; the shares add up to 100 %. Each moment
    counts for one row: the innermost callback or part whose code runs. A callback's row holds its
    hooks, its wrappers around methods (for example, an attack around ``training_step``) and its
    hooks on optimizers and modules. On a GPU, work that Python only starts is not in its row; it
    counts where Python waits. Validation and the hooks of epochs are in a column of their own.

    **What is not counted for a callback.** Hooks of tensors, which run inside ``backward``; weights
    that a view computes inside ``training_step``; methods that a callback replaces by plain
    assignment; hooks on compiled modules; and what it added in ``setup`` before this
    callback's turn, unless it is a wrapper. All of it counts for the part of the step in which it runs.

    **Hooks.** ``setup``, to wrap the hooks of all callbacks on the instances. Everything is removed
    after the last watched batch.

    **Logs.** At the end of the watch: ``doctor/table`` (W&B; text in TensorBoard;
    ``training_doctor.csv``), and in the summary ``doctor/callbacks_share``, ``doctor/batch_ms``
    and ``doctor/callbacks_host_syncs`` per batch. At the end of the fit: ``doctor/figure``
    (``training_doctor.png``).

    **State.** None: every fit is watched, including a resumed one.

    **Cost.** docs/benchmarks.md lists it. Nothing after the watch.

    Attributes:
        rows: The table of the latest fit; empty before the end of the watch and on other ranks than zero.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.TrainingDoctor
                - class_path: lightning_grad.callbacks.ZClip
    """

    namespace: ClassVar[str] = "doctor"
    compatibility: ClassVar[Compatibility] = GradCallback.compatibility.but(
        ddp=yes("Only rank zero is watched; its waiting for other ranks counts as backward."),
        compiled=yes("Hooks on compiled modules count as part of the step."),
    )
    trial: ClassVar[Mapping[str, Any]] = {"batches": 6}

    rows = until_next_fit.of(list[dict[str, Any]])
    _watch = during_fit[Watch | None](lambda _: None)

    def __init__(
        self, batches: int = 50, host_syncs: bool = True, figure: bool = True, name: str | None = None
    ) -> None:
        super().__init__(name)
        self.batches: int = check_count(batches, 1, "batches")
        self.host_syncs = host_syncs
        self.figure = figure

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if not self.fitting:
            return
        if sum(isinstance(other, TrainingDoctor) for other in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise ValueError("Use only one TrainingDoctor per Trainer: two would time each other.")
        if trainer.is_global_zero:
            finish = partial(self._finish, trainer)
            watch = self._watch = Watch(trainer, pl_module, self, self.batches, self.host_syncs, finish)
            self.undo.push(watch.stop)
            watch.start()

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        names = [] if self._watch is None else self._watch.labels
        first = SKIPPED + RECORDED + 1
        last = first + self.batches - 1
        self.announce(f"times all callbacks in batches {first} to {last} of this fit", "callbacks", names)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish(trainer)
        if self.rows and self.figure:
            with tolerated(self.display_name, "the figure"):
                path = output_file(trainer, self.display_name, ".png")
                log_figure(trainer, self.log_key("figure"), partial(draw, self.rows, self._title()), path)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        with contextlib.suppress(Exception):  # an error here would keep Lightning from calling the later callbacks
            self._finish(trainer)

    def _finish(self, trainer: pl.Trainer) -> None:
        """Stop watching, print the table and log it; does nothing the second time."""
        watch, self._watch = self._watch, None
        if watch is None:
            return
        watch.stop()
        if watch.timed:
            with tolerated(self.display_name, "the table"):
                self.rows = rows_of(watch)
                table = text_of(self.rows, watch.timed, trainer.strategy.root_device.type)
                rank_zero_info(f"{self.display_name}: {table}")
                self._log(trainer)
        elif watch.seen:
            self.say(f"has no times: it times from batch {SKIPPED + RECORDED + 1} on, and the fit ended before")

    def _log(self, trainer: pl.Trainer) -> None:
        callbacks = [row for row in self.rows if row["is_callback"]]
        summary = {
            "callbacks_share": sum(row["share"] for row in callbacks),
            "batch_ms": sum(row["milliseconds"] for row in self.rows),
            "callbacks_host_syncs": sum(row["host_syncs"] or 0.0 for row in callbacks),
        }
        log_summary(trainer, {self.log_key(key): value for key, value in summary.items()})
        log_table(trainer, self.log_key("table"), self.rows, output_file(trainer, self.display_name, ".csv"))

    def _title(self) -> str:
        share = sum(row["share"] for row in self.rows if row["is_callback"])
        return f"{self.display_name}: callbacks take {100 * share:.1f} % of the host's time"
