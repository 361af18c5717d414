"""Go back to a copy of the run at a spike: the callback. The test is :func:`lightning_grad.functional.is_spike`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_grad.core import (
    WHOLE_WEIGHTS,
    Compatibility,
    GradCallback,
    GradientConditioner,
    Role,
    RunRecord,
    check_above,
    check_count,
    during_fit,
    is_log_step,
    manual,
    no,
    until_next_fit,
    yes,
)
from lightning_grad.core.ranks import lists_of_ranks
from lightning_grad.core.record import panels, style_axis
from lightning_grad.core.roles import refuse_order
from lightning_grad.core.samples.batch_indices import BatchIndices
from lightning_grad.core.steps.run_copy import epoch_begins, epoch_ends, go_back, take_copy
from lightning_grad.functional import is_spike
from lightning_grad.functional.gradients.tensor_lists import joined_norm
from lightning_grad.functional.plain_tensors import plain_tensor
from lightning_grad.utilities.optimizers import Shape, optimizer_shape
from lightning_grad.utilities.precision import grad_scaler
from lightning_grad.utilities.reporting import counted, listed, log_summary, stepped_batches

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_RECENT = 64  # steps whose median is the usual norm
_MOST_SAMPLES = 8  # indices in a message; the table has all


class SpikeRewind(GradCallback):
    r"""Go back a few steps at a spike of the gradient norm, and continue behind the bad batch.

    .. math::
        \lVert g_t \rVert > c \cdot \operatorname{median}\bigl(\lVert g_{t-64} \rVert, \ldots, \lVert g_{t-1} \rVert\bigr)
        \quad\text{or not finite}

    Clipping limits the step of a bad batch. This takes back that step and those before it, whose damage may have caused
    the spike: weights, buffers, optimizers, schedulers, the GradScaler and random states are those of the oldest copy. The
    batches since then are not trained on again, so the run continues bit for bit like one whose data never had them.
    Steps and epochs keep counting.

    Args:
        window: Largest number of steps that the run goes back.
            The default is a choice of this library; PaLM went back about 100 steps.
        copies: Copies to hold. A new one is taken every window // copies steps.
        factor: Multiple of the usual norm above which a step is a spike, above 1.
            The default is a choice of this library.
        max_in_row: Raise an error at the next spike after going back this often to one copy; None never raises.
        save_copies: Put the copies into checkpoints, so a resumed run goes back like an uninterrupted one.
            Each takes as much space as weights and optimizer state together.
        figure: Draw the rewinds at the end of the run (needs matplotlib and a logger with a folder).
        name: Name of this instance; part of state and log keys.

    Raises:
        ValueError: In the constructor for numbers out of range. In ``setup`` for sharded strategies, manual optimization, or
            if a callback that changes gradients precedes it.
        RuntimeError: At a spike after max_in_row rewinds to the same copy.

    **Hooks.** ``on_before_optimizer_step``, to measure the gradient. At a spike, gradients are set to ``None``, so the
    optimizer does nothing. ``on_train_batch_end``, after the schedulers, to take a copy or go back.

    **Logs** under ``grad/spike_rewind/``, at log steps: ``rewinds`` (so far); also in the summary. The table ``record`` has
    the step, the last step that was kept, norm, usual norm and the samples of the bad batch. With a rewind, at the end: a
    figure of the norms.

    **State.** The norms of the last 64 steps, the record, counters, and, with save_copies, the copies.

    **Cost.** One norm per step. The host must know whether to go back, so it waits for the device once per step, like a
    GradScaler; under DDP, the ranks agree by a reduction, for which it waits again. Memory: ``copies`` times the weights,
    buffers and optimizer state; with AdamW six times the weights for two copies.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.SpikeRewind
                  init_args:
                    window: 8
                    copies: 2

    References:
        Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways", 2022, arXiv 2204.02311, section 5.1: restart from a
        checkpoint before the spike, and skip the batches around it.
    """

    namespace: ClassVar[str] = "grad/spike_rewind"
    role: ClassVar[Role] = "guard"
    syncs_per_step: ClassVar[str] = "the host must know whether to go back: one wait per step, two under DDP"
    compatibility: ClassVar[Compatibility] = GradientConditioner.compatibility.but(
        weight_averaging=yes("The average keeps what steps added that were taken back."),
        late_gradients=no(
            "would go back in the weights, but not in what {} has accumulated", "Train with strategy='ddp'"
        ),
        local_steps=no(
            "would go back on all ranks, and under {} past exchanges that it cannot take back",
            "Use SkipNonFinite or SpikeClipping, which act on each rank alone, or strategy='ddp'",
        ),
        **manual(
            no("takes back whole steps, and under {} the module steps its optimizers itself", "Use SkipNonFinite")
        ),
        **WHOLE_WEIGHTS,
    )
    trial: ClassVar[Mapping[str, Any]] = {"window": 4, "copies": 2}

    rewinds = until_next_fit.of(RunRecord).saved()
    norms = until_next_fit[RunRecord](lambda _: RunRecord(weight=_norm)).saved()
    _recent = until_next_fit.of(list[float]).saved()
    _age = until_next_fit.of(int).saved()  # steps since the latest copy
    _in_row = until_next_fit.of(int).saved()
    _copies = until_next_fit.of(list[dict[str, Any]])
    _shapes = during_fit.of(list[Shape])
    _norm = during_fit[float | None](lambda _: None)
    _has_stepped = during_fit.of(bool)
    _has_spiked = during_fit.of(bool)
    _indices = during_fit[BatchIndices]()
    _drawn = during_fit.of(list[int])

    def __init__(
        self,
        window: int = 8,
        copies: int = 2,
        factor: float = 10.0,
        max_in_row: int | None = 5,
        save_copies: bool = True,
        figure: bool = True,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self.window = check_count(window, 1, "window")
        self.copies = check_count(copies, 1, "copies")
        if window < copies:
            raise ValueError(
                f"window must be at least copies={copies}; got {window}. A copy is taken once a step at most."
            )
        self.factor = check_above(factor, 1.0, "factor")
        self.max_in_row = check_count(max_in_row, 1, "max_in_row")
        self.save_copies = save_copies
        self.figure = figure

    # The fit begins.

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.fitting:
            refuse_order(trainer)
            self._indices = BatchIndices(trainer, self.undo)
            self.undo_after_saving.push(self._drop_copies)

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        if not self.changed_settings(state, "copies", "window"):
            self._copies = list(state.get("copies", []))

    @override
    def state_dict(self) -> dict[str, Any]:
        # Without random states, which Lightning does not restore either.
        copies = [{key: value for key, value in each.items() if key != "random"} for each in self._copies]
        return {**super().state_dict(), "copies": copies if self.save_copies else []}

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for optimizer in trainer.optimizers:
            self.works_with().refuse_optimizer(self.display_name, trainer, optimizer)
        self.works_with().refuse_parameters(self.display_name, pl_module)
        names = [name for name, parameter in pl_module.named_parameters() if parameter.requires_grad]
        self.announce(f"goes back up to {counted(self.window, 'step')} at a spike", "parameters", names)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._shapes = [optimizer_shape(optimizer) for optimizer in trainer.optimizers]
        if not self._copies:
            self._take_copy(trainer, pl_module, stepped_batches(trainer) - 1)

    # One training step.

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._drawn += self._indices.of_batch(batch_idx)
        shapes = [optimizer_shape(optimizer) for optimizer in trainer.optimizers]
        if shapes != self._shapes:  # the copies do not fit optimizers that were given other parameters
            self._shapes, self._copies, self._in_row = shapes, [], 0
            self._take_copy(trainer, pl_module, stepped_batches(trainer) - 1)
        if batch_idx == 0:
            self._copies = [epoch_begins(each) for each in self._copies]

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        self._has_stepped = True
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [plain_tensor(p.grad) for p in parameters if p.grad is not None]
        if not gradients:  # another callback skips the step
            return
        self._norm = float(joined_norm(gradients))
        overflows = grad_scaler(trainer) is not None and not math.isfinite(self._norm)  # the scaler skips the step
        spikes = not overflows and is_spike(self._norm, self._recent, self.factor)
        if trainer.strategy.reduce_boolean_decision(spikes, all=False):
            self._has_spiked = True
            for parameter in parameters:
                parameter.grad = None

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.fit_loop.epoch_loop._num_ready_batches_reached():  # the schedulers of the epoch have stepped
            self._copies = [epoch_ends(trainer, each) for each in self._copies]
        if not self._has_stepped:
            return
        norm, spikes, drawn = self._norm, self._has_spiked, self._drawn
        self._norm, self._has_stepped, self._has_spiked, self._drawn = None, False, False, []
        if norm is not None:
            self.norms.add({"step": stepped_batches(trainer), "norm": norm})
        if spikes:
            self._rewind(trainer, pl_module, self.norms.last["norm"], lists_of_ranks(trainer, drawn))
        else:
            self._advance(trainer, pl_module, norm)
        if is_log_step(trainer):
            self.log_scalars(pl_module, {"rewinds": float(self.rewinds.count)})

    def _advance(self, trainer: pl.Trainer, pl_module: pl.LightningModule, norm: float | None) -> None:
        if norm is not None and math.isfinite(norm):
            self._recent = [*self._recent, norm][-_RECENT:]
        self._age += 1
        if self._age >= self.window // self.copies:
            self._take_copy(trainer, pl_module, stepped_batches(trainer))

    def _take_copy(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        if len(self._copies) == self.copies:
            del self._copies[0]  # first, so memory never holds one more
            self._in_row = 0
        taken = {**take_copy(trainer, pl_module), "step": step, "recent": list(self._recent)}
        self._copies.append(taken)
        self._age = 0

    def _rewind(self, trainer: pl.Trainer, pl_module: pl.LightningModule, norm: float, drawn: list[int]) -> None:
        """Go back to the oldest copy, which stays the only one."""
        oldest, step = self._copies[0], stepped_batches(trainer)
        usual = statistics.median(self._recent) if self._recent else None
        samples = listed(drawn, _MOST_SAMPLES) or "unknown"
        where = f"step {step}, with a gradient norm of {norm:.3g}; the batch has the samples {samples}"
        back_to = "first weights" if oldest["step"] < 0 else f"weights after step {oldest['step']}"
        if self.max_in_row is not None and self._in_row >= self.max_in_row:
            raise RuntimeError(
                f"{self.display_name} went back to the {back_to} {counted(self._in_row, 'time')}, and each time another "
                f"spike followed within {counted(self.window, 'step')}; the last one is at {where}. The likely cause is "
                "not a batch. Lower the learning rate, or increase window or factor. To continue anyway, set "
                "max_in_row=None."
            )
        go_back(trainer, pl_module, oldest)
        self._copies, self._recent, self._age = [oldest], list(oldest["recent"]), 0
        self._in_row += 1
        rank_zero_warn(f"{self.display_name} goes back to the {back_to}: a spike at {where}.")
        row = {"step": step, "epoch": trainer.current_epoch, "back_to": oldest["step"]}
        self.rewinds.add({**row, "norm": norm, "usual_norm": usual, "samples": " ".join(map(str, drawn))})
        self.rewinds.save(trainer, self)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.rewinds.count:
            self.rewinds.report(trainer, self, self._draw)
        log_summary(trainer, {self.log_key("rewinds"): float(self.rewinds.count)})

    def _drop_copies(self) -> None:
        self._copies = []

    def _draw(self) -> Figure:
        """Draw the norm of each step, with the steps that were taken back."""
        figure, (axis,) = panels(f"{self.display_name}: {counted(self.rewinds.count, 'rewind')}", [3.0])
        axis.plot(*self.norms.series("norm"), color="#0072b2", linewidth=1.2, label="gradient norm")
        rows = self.rewinds.kept
        for row in rows:
            label = "steps taken back" if row is rows[0] else None
            axis.axvspan(row["back_to"] + 0.5, row["step"] + 0.5, color="#f7d4c0", zorder=0, label=label)
        spikes = {row["step"]: row["norm"] for row in rows if math.isfinite(row["norm"])}
        infinite = [row["step"] for row in rows if row["step"] not in spikes]
        if spikes:
            axis.plot(*zip(*spikes.items(), strict=True), "x", color="#b3261e", label="spike")
        if infinite:  # at the upper edge
            edge = axis.get_xaxis_transform()
            heights = [1.0] * len(infinite)
            axis.plot(infinite, heights, "v", color="#b3261e", label="not finite", transform=edge, clip_on=False)
        axis.set_yscale("log")
        axis.set_ylabel("gradient norm")
        axis.set_xlabel("step")
        axis.legend(frameon=False, fontsize="small", ncols=4, loc="lower left", bbox_to_anchor=(0, 1), borderpad=0)
        style_axis(axis)
        return figure


def _norm(row: Mapping[str, Any]) -> float:
    return float(row["norm"]) if math.isfinite(row["norm"]) else math.inf
