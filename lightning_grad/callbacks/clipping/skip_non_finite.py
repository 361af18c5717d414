"""Skipping steps whose gradients are not finite: the callback. The test is :func:`lightning_grad.functional.nonfinite`."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_grad.core import GradientConditioner, GradientStep, Role, check_count, during_fit, until_next_fit
from lightning_grad.functional import nonfinite
from lightning_grad.functional.gradients.tensor_lists import stack_norms
from lightning_grad.utilities.forward_order import ForwardOrder
from lightning_grad.utilities.optimizers import OptimizerCounts
from lightning_grad.utilities.precision import grad_scaler, true_loss
from lightning_grad.utilities.reporting import log_summary


class SkipNonFinite(GradientConditioner):
    """Skip a step with non-finite gradients, on every rank, and name the first bad parameter.

    The gradients are set to ``None``, so that neither momentum nor weight decay moves anything; with zeros AdamW would
    still move. The first bad parameter in the order of the forward pass is named, with the batch. A run of such steps raises,
    for then the weights are lost and not the batch.

    With an fp16 GradScaler overflows are daily business: the scaler skips those steps itself and lowers its scale. They are
    left to it, and count towards the run only once its scale is below 1.

    Args:
        max_in_row: Raise when so many steps in a row had to be skipped; None never raises.
        max_warnings: Number of skipped steps that are reported one by one.
        include: Names or wildcards of the parameters or modules that are looked at; default all.
        exclude: Names or wildcards of those that are not.
        name: Name of this instance, needed when two are used.

    Raises:
        ValueError: In the constructor unless max_in_row is at least 1 and max_warnings at least 0. Before the first batch
            under FSDP1 and DeepSpeed, with a fused optimizer in fp16, for sparse gradients, and for a name pattern that
            matches nothing.
        RuntimeError: After max_in_row skipped steps in a row.

    **Hooks.** ``on_before_optimizer_step``: gradients are accumulated, unscaled and reduced. During the first batch hooks
    on the module's children learn the order of the forward pass.

    **Logs** under ``grad/skip_non_finite/``, at log steps: ``skipped`` (steps so far); also in the summary.

    **State.** Steps skipped, in all and in a row.

    **Cost.** The largest magnitude of each gradient. The host must know whether to step, so it waits for the device once a
    step, as GradScaler does; under DDP the ranks agree by one reduction.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.SkipNonFinite
                  init_args:
                    max_in_row: 10

    References:
        Requested of Lightning in its issues 4956 and 5152. The default of max_in_row is ours.
    """

    namespace: ClassVar[str] = "grad/skip_non_finite"
    trial: ClassVar[Mapping[str, Any]] = {"max_in_row": 3}
    role: ClassVar[Role] = "guard"
    syncs_per_step: ClassVar[str] = "whether a step is made must be known on the host: one wait a step"

    _skipped = until_next_fit.of(OptimizerCounts).saved()
    _in_row = until_next_fit.of(OptimizerCounts).saved()
    _told = during_fit.of(int)
    _batch_idx = during_fit.of(int)
    _loss = during_fit[Tensor | None](lambda _: None)
    _order = during_fit[ForwardOrder]()
    _trainer = during_fit[pl.Trainer]()

    def __init__(
        self,
        max_in_row: int | None = 10,
        max_warnings: int = 5,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(include, exclude, name)
        self.max_in_row = check_count(max_in_row, 1, "max_in_row")
        self.max_warnings = check_count(max_warnings, 0, "max_warnings")

    # The fit begins.

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._trainer, self._order = trainer, ForwardOrder(pl_module)
        self.undo.push(self._order.stop)

    # One training step.

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch_idx = batch_idx
        self._order.watch()

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self._loss = true_loss(trainer, pl_module, loss)
        self._order.stop()

    @override
    def condition(self, step: GradientStep) -> Mapping[str, Tensor | float]:
        # A sum of squares that is finite has no other terms, and takes a sixth of the time of looking at each.
        skip = self._on_any_rank(not bool(stack_norms(step.gradients).isfinite().all()))
        bad = nonfinite(step.gradients) if skip else torch.zeros(0)
        skip = skip and self._on_any_rank(bool(bad.any()))
        if skip:
            self._skip(step, bad)
        else:
            self._in_row[step.index] = 0
        return {"skipped": float(self._skipped[step.index])}

    def _on_any_rank(self, here: bool) -> bool:
        return bool(self._trainer.strategy.reduce_boolean_decision(here, all=False))

    def _skip(self, step: GradientStep, bad: Tensor) -> None:
        scaler = grad_scaler(self._trainer)
        if scaler is None or scaler.get_scale() < 1.0:
            self._in_row[step.index] += 1
            self._tell(step, bad)
        self._skipped[step.index] += 1
        # Not by zero_grad: an optimizer may have one of its own, which leaves zeros, or takes no argument.
        for group in step.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def _tell(self, step: GradientStep, bad: Tensor) -> None:
        in_row = self._in_row[step.index]
        where = self._where(step, bad)
        if self.max_in_row is not None and in_row >= self.max_in_row:
            raise RuntimeError(
                f"{self.display_name}: {in_row} steps in a row had gradients that are not finite, the last in {where}. The "
                "weights, and not a batch, are the likely cause: lower the learning rate, or resume from an earlier "
                "checkpoint. To go on all the same, set max_in_row=None."
            )
        self._told += 1
        if self._told <= self.max_warnings:
            last = " Further ones are only counted." if self._told == self.max_warnings else ""
            rank_zero_warn(f"{self.display_name} skips a step: not finite in {where}.{last}")

    def _where(self, step: GradientStep, bad: Tensor) -> str:
        names = [name for name, is_bad in zip(step.names, bad.tolist(), strict=True) if is_bad]
        loss = "unknown" if self._loss is None else f"{self._loss.float().mean().item():g}"
        if not names:
            return f"a gradient of another rank, batch {self._batch_idx} (loss here {loss})"
        first = self._order.sort(names)[0]
        return f"{first}, first of {len(names)} of {len(bad)} gradients, batch {self._batch_idx} (loss {loss})"

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        log_summary(trainer, {self.log_key("skipped"): float(sum(self._skipped.values()))})
