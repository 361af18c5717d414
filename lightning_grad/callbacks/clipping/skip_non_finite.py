"""Skipping steps with non-finite gradients: the callback. The test is :func:`lightning_grad.functional.nonfinite`."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_grad.core import (
    GradientConditioner,
    GradientStep,
    Role,
    check_count,
    during_fit,
    is_repeated,
    until_next_fit,
)
from lightning_grad.functional import nonfinite
from lightning_grad.functional.gradients.tensor_lists import joined_norm
from lightning_grad.utilities.forward_order import ForwardOrder
from lightning_grad.utilities.optimizers import OptimizerCounts
from lightning_grad.utilities.precision import grad_scaler, true_loss
from lightning_grad.utilities.reporting import log_summary


class SkipNonFinite(GradientConditioner):
    """Skip a step with non-finite gradients, on every rank, and name the first bad parameter.

    The gradients are set to ``None``, so neither momentum nor weight decay moves a parameter; with
    zeros AdamW would still move them. A warning names the batch and the bad parameter that comes
    first in the forward pass. Several such steps in a row raise an error, because then the weights
    are the likely cause and not a batch.

    An fp16 GradScaler regularly causes overflows. It skips those steps itself and lowers its scale,
    so they count towards max_in_row only once its scale is below 1.

    Args:
        max_in_row: Raise an error after this many skipped steps in a row; None never raises.
        max_warnings: Number of skipped steps to warn about. Later ones are only counted.
        include: Names or wildcards of the parameters or modules to check. Default: all.
        exclude: Names or wildcards of the parameters or modules not to check.
        name: Name of this instance. Required if the Trainer has two of this class.

    Raises:
        ValueError: In the constructor if max_in_row is below 1 or max_warnings is negative. Before the
            first batch under FSDP1 or DeepSpeed, with a fused optimizer in fp16, with sparse
            gradients, or if a name pattern matches nothing.
        RuntimeError: After max_in_row skipped steps in a row.

    **Hooks.** ``on_before_optimizer_step``, after gradients are accumulated, unscaled and reduced.
    During the first batch, hooks on the module's children record the order of the forward pass.

    **Logs** under ``grad/skip_non_finite/``, at log steps: ``skipped`` (steps so far); also in the
    summary.

    **State.** The number of skipped steps, in total and in a row.

    **Cost.** One norm. The host must know whether to step, so it waits for the
    device once per step, like a GradScaler. Under DDP the ranks agree by one reduction.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.SkipNonFinite
                  init_args:
                    max_in_row: 10

    References:
        Requested in Lightning's issues 4956 and 5152. The default of max_in_row is a choice of this
        library.
    """

    namespace: ClassVar[str] = "grad/skip_non_finite"
    trial: ClassVar[Mapping[str, Any]] = {"max_in_row": 3}
    role: ClassVar[Role] = "guard"
    syncs_per_step: ClassVar[str] = "the host must know whether to step: one wait per step"

    _skipped = until_next_fit.of(OptimizerCounts).saved()
    _in_row = until_next_fit.of(OptimizerCounts).saved()
    _warned = during_fit.of(int)
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
        if not is_repeated(pl_module):
            self._loss = true_loss(trainer, pl_module, loss)
        self._order.stop()

    @override
    def condition(self, step: GradientStep) -> Mapping[str, Tensor | float]:
        # A finite sum of squares has only finite terms. A sum that is not finite may be an overflow, so the second test
        # decides.
        skip = self._on_any_rank(not bool(joined_norm(step.gradients).isfinite()))
        bad = nonfinite(step.gradients) if skip else torch.zeros(0)
        skip = skip and self._on_any_rank(bool(bad.any()))
        if skip:
            self._skip(step, bad)
        else:
            self._in_row[step.index] = 0
        return {"skipped": float(self._skipped[step.index])}

    def _on_any_rank(self, here: bool) -> bool:
        if getattr(self._trainer.strategy, "gradient_is_local", False):
            return here
        return bool(self._trainer.strategy.reduce_boolean_decision(here, all=False))

    def _skip(self, step: GradientStep, bad: Tensor) -> None:
        scaler = grad_scaler(self._trainer)
        if scaler is None or scaler.get_scale() < 1.0:
            self._in_row[step.index] += 1
            self._report(step, bad)
        self._skipped[step.index] += 1
        # Not by zero_grad: an optimizer may override it, and then leave zeros or accept no argument.
        for group in step.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def _report(self, step: GradientStep, bad: Tensor) -> None:
        """Warn about a skipped step, or raise if too many in a row were skipped."""
        in_row = self._in_row[step.index]
        where = self._where(step, bad)
        if self.max_in_row is not None and in_row >= self.max_in_row:
            raise RuntimeError(
                f"{self.display_name}: {in_row} steps in a row had non-finite gradients; in the last, {where}. The likely "
                "cause is the weights, not a batch. Lower the learning rate, or resume from an earlier checkpoint. To "
                "continue anyway, set max_in_row=None."
            )
        self._warned += 1
        if self._warned <= self.max_warnings:
            last = " Later ones are only counted." if self._warned == self.max_warnings else ""
            rank_zero_warn(f"{self.display_name} skips a step: {where}.{last}")

    def _where(self, step: GradientStep, bad: Tensor) -> str:
        names = [name for name, is_bad in zip(step.names, bad.tolist(), strict=True) if is_bad]
        loss = "unknown" if self._loss is None else f"{self._loss.float().mean().item():g}"
        if not names:
            return f"a gradient on another rank is not finite, batch {self._batch_idx} (loss here {loss})"
        first = self._order.sort(names)[0]
        count = f"{len(names)} of {len(bad)} gradients are not finite"
        return f"{count}, starting with {first}, batch {self._batch_idx} (loss {loss})"

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        log_summary(trainer, {self.log_key("skipped"): float(sum(self._skipped.values()))})
