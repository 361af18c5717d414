"""The life of shown weights in a fit: followed in every step, as stored in validations and checkpoints, plain at its end.

Used by ``core/weights.py``, where weights are chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Generic

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_grad.core.callback import GradCallback
from lightning_grad.core.compatibility import WHOLE_WEIGHTS, Compatibility
from lightning_grad.core.fit import during_fit, until_next_fit
from lightning_grad.core.views.module_chains import ModuleChains
from lightning_grad.core.views.portable import make_portable, wrap_loading
from lightning_grad.core.views.weight_chain import Chain, Stage
from lightning_grad.core.views.weight_choice import Selection, W


class ShownWeights(GradCallback, Generic[W]):
    """Keeps what a module is shown of its weights up to date, and takes it away at the end of the fit."""

    stage: ClassVar[Stage]
    effect: ClassVar[str]
    compatibility: ClassVar[Compatibility] = GradCallback.compatibility.but(**WHOLE_WEIGHTS)

    restored = until_next_fit.of(dict[str, Any])
    has_stepped = until_next_fit.of(bool)
    _selection = until_next_fit[Selection[Any] | None](lambda _: None)
    _chains = during_fit[ModuleChains]()
    _resumed = during_fit.of(dict[str, dict[str, Any]])  # states of weights, until the first batch
    _infers = during_fit.of(bool)

    def refresh(self, weight: W) -> None:
        """Recompute what a weight shows, because it is new or was changed from outside."""
        weight.refresh()

    def step(self, weight: W) -> None:
        """Follow an optimizer step that has moved a weight."""
        weight.step()

    def settle(self, trainer: pl.Trainer) -> Sequence[W]:
        """Return the weights that keep what is stored of them when the fit has ended without an exception."""
        return self.weights if trainer.global_step > 0 else []

    @property
    def weights(self) -> list[W]:
        """The chosen weights, in the order of the module."""
        return [] if self._selection is None else self._selection.weights

    def owned_by(self, optimizer: Optimizer) -> list[W]:
        """Return the chosen weights that an optimizer moves."""
        return [] if self._selection is None else self._selection.owned_by(optimizer)

    def views(self) -> dict[str, tuple[Tensor, Chain]]:
        """Return dense weight and chain by every key of ``state_dict``, where this technique's stage is the chain's first."""
        return {} if self._selection is None else self._selection.views()

    def renew(self, weight: W, stepped: bool = False) -> None:
        """Bring a weight up to date, and let the stages after this one know."""
        (self.step if stepped else self.refresh)(weight)
        weight.is_renewed()

    def renew_stale(self) -> None:
        """Bring weights up to date that a load, weight averaging or an earlier stage has changed."""
        for weight in self.weights:
            if not weight.is_stale:
                continue
            is_dense_as_before = not weight.is_changed
            self.renew(weight)
            if is_dense_as_before:
                self._load_state(weight)  # an earlier stage has started after this one

    # The fit begins.

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.fitting:
            self.undo.push(wrap_loading(pl_module, self.state_key))

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if self.fitting:
            self.restored = state_dict
            if self.weights:
                self.resume()

    def resume(self) -> None:
        """Start from the restored state, or from the beginning: in ``on_fit_start``, and again in ``on_train_start``."""
        for weight in self.weights:
            self.renew(weight)
        saved = self.restored.get("weights", {})
        self._resumed = {w.name: saved.get(w.name, {}) for w in self.weights if self.is_as_before(w)}
        for weight in self.weights:
            self._load_state(weight)
        self._chains.renew_after(self)

    def _load_state(self, weight: W) -> None:
        state = self._resumed.get(weight.name)
        if state:
            weight.load_state_dict(state)
            weight.is_renewed()

    def is_as_before(self, weight: W) -> bool:
        """Return whether the restored state of a weight is that of such a one; settings may change on resume."""
        return bool(self.restored.get("chosen", {}).get(weight.name) == weight.signature)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.resume()  # the length of the run and the step at which it resumes are known only now
        self.restored = {}

    # One training step.

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._leave_inference()
        self._chains.begin_batch()
        self._resumed = {}

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if pl_module.automatic_optimization:
            self._chains.close_window()

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        self._chains.close_window()

    @torch.no_grad()
    def after_step(self, trainer: pl.Trainer, optimizer: Optimizer) -> None:
        """Follow an optimizer that has moved its weights; techniques are called in the order of their stages."""
        self.has_stepped = True
        for weight in self.owned_by(optimizer):
            self.renew(weight, stepped=True)
        for weight in self.weights:
            if weight.is_outdated:
                self.renew(weight)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._chains.close_window()

    # Validation and checkpoints.

    @override
    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        # Not before the first batch: weight averaging swaps its weights in only after on_validation_start.
        if self.fitting and not self._infers:
            self._infers = True
            for weight in self.weights:
                weight.chain.enter_inference()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._leave_inference()

    def _leave_inference(self) -> None:
        self._infers = False
        for weight in self.weights:
            weight.chain.leave_inference()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "weights": {weight.name: weight.state_dict() for weight in self.weights}}

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # During a fit the module's own hook does this, later than every callback; after an exception it is gone.
        if self._selection is not None and not len(self.undo_after_saving):
            make_portable(checkpoint, self.state_key, self.views())

    # The fit ends.

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._leave_inference()
        if self.fitting and any(weight.stores for weight in self.weights):
            rank_zero_info(
                f"{self.label}: the fit stopped by {type(exception).__name__}. The module in memory is left dense; "
                f"checkpoints that callbacks have written hold the {self.effect} weights, and resume exactly."
            )

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        chains = self._chains if self.fitting and self.weights else None
        super().teardown(trainer, pl_module, stage)
        if chains is not None:
            chains.bake()
        self._selection = None
