"""The base of the callbacks that show a module other weights than those that train: sparse, quantized, with noise.

The optimizer, DDP and weight averaging keep the dense weight; the module computes with what the technique makes of it. A
technique derives from :class:`WeightCallback` and writes ``view``, which returns a
:class:`~lightning_grad.core.weight_chain.ViewedWeight` for each weight that it takes. The rest stands here and in

- ``weight_choice.py`` and ``network_ends.py``: which weights are chosen;
- ``weight_chain.py``: one weight and the techniques that act on it, one after the other;
- ``module_chains.py``: the weights of one module, and what happens once for all techniques;
- ``weight_selection.py``: the weights of one technique;
- ``weight_view.py``, ``in_place_view.py``, ``portable.py``: how a module sees other weights, and what a checkpoint holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Generic

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer
from typing_extensions import override

from lightning_grad.core.callback import GradCallback
from lightning_grad.core.fit import during_fit, until_next_fit
from lightning_grad.core.module_chains import ModuleChains, chains_of, refuse_taken
from lightning_grad.core.network_ends import Ends
from lightning_grad.core.portable import make_portable, wrap_loading, wrap_saving
from lightning_grad.core.weight_chain import FoundWeight, Stage
from lightning_grad.core.weight_choice import W, Wanted, WeightChoice, refuse_pruners
from lightning_grad.core.weight_selection import Selection
from lightning_grad.utilities.parameters import as_names, check_patterns, matches, parameter_names
from lightning_grad.utilities.reporting import counted


class WeightCallback(GradCallback, Generic[W]):
    """Shows a module what :meth:`view` makes of its weights.

    It chooses the weights, shows them, refreshes them when an optimizer, a load or weight averaging has changed them, and
    takes everything away at the end of the fit. Validation and checkpoints use what ``ViewedWeight.stored`` returns; a
    checkpoint loads into the plain module, and a resumed run continues from the dense weights bit for bit. At the end of the
    fit the stored weights become the module's own; after an exception the module is left dense.

    Several techniques may take the same weight, each another ``stage``; the order of the callbacks makes no difference. What
    a checkpoint's stored weight lacks to be dense is in the state of the technique whose stage is the first. Without that
    technique a run resumes from the stored weights.

    Class attributes:

    - ``stage``: when it acts on a weight on which others act too.
    - ``effect``: what it makes of a weight, an adjective.
    - ``verb``: what it does with a weight.
    - ``column``: what the table of weights says about each, a noun.

    Args:
        include: Names or wildcards of parameters or modules. Default: every Linear, Conv1d/2d/3d, attention projection and
            other layer that multiplies by a matrix named weight, but the first and the last that the first batch reaches.
            Parameters of other modules must be spelled to the end.
        exclude: Names or wildcards of what stays as it is.
        name: Name of this instance.
    """

    stage: ClassVar[Stage]
    effect: ClassVar[str]
    verb: ClassVar[str] = "change"
    column: ClassVar[str] = "effect"
    needs_whole_weights: ClassVar[bool] = True

    restored = until_next_fit.of(dict[str, Any])
    chosen = until_next_fit.of(dict[str, list[str | int]])
    has_stepped = until_next_fit.of(bool)
    _selection = until_next_fit[Selection[Any] | None](lambda _: None)
    _known_ends = until_next_fit[list[str] | None](lambda _: None)
    _chains = during_fit[ModuleChains]()
    _infers = during_fit.of(bool)

    def __init__(
        self, include: Sequence[str] | None = None, exclude: Sequence[str] | None = None, name: str | None = None
    ) -> None:
        super().__init__(name)
        self.include = as_names(include)
        self.exclude = as_names(exclude)

    # What a technique writes.

    def view(self, found: FoundWeight) -> W | str:
        """Return what the technique makes of a weight, or the reason why it leaves it as it is."""
        raise NotImplementedError

    def why_excluded(self, names: Sequence[str]) -> str:
        """Return why a parameter of some names is left out; empty if it is not."""
        return "excluded" if matches(names, self.exclude or []) else ""

    def check_names(self, pl_module: pl.LightningModule) -> None:
        """Raise if a name pattern of the user matches nothing."""
        names = parameter_names(pl_module)
        check_patterns(self.include or [], names, f"{self.label}(include=...)")
        check_patterns(self.exclude or [], names, f"{self.label}(exclude=...)")

    def refuse(self, trainer: pl.Trainer, choice: WeightChoice[W]) -> None:
        """Raise if the chosen weights cannot be shown, before any is."""
        if not choice.chosen:
            why = choice.why_none(self.effect, self.column)
            raise ValueError(f"{self.label} finds no weight to make {self.effect}. {why}")
        refuse_taken(self._chains, self.stage, choice.chosen, self.label)
        refuse_pruners(trainer.callbacks, choice.chosen, self.label, self.verb)  # type: ignore[attr-defined]

    @property
    def plan(self) -> str:
        """What it will do in this fit, for the line that is printed when it begins."""
        return f"makes {counted(len(self.weights), 'weight')} {self.effect}"

    def refresh(self, weight: W) -> None:
        """Recompute what a weight shows, because it is new or somebody has changed it."""
        weight.refresh()

    def step(self, weight: W) -> None:
        """Follow an optimizer step that has moved a weight."""
        weight.step()

    def settle(self, trainer: pl.Trainer) -> Sequence[W]:
        """Return the weights that keep what is stored of them when the fit has ended without an exception."""
        return self.weights if trainer.global_step > 0 else []

    # What it calls.

    @property
    def weights(self) -> list[W]:
        """The chosen weights, in the order of the module."""
        return [] if self._selection is None else self._selection.weights

    def owned_by(self, optimizer: Optimizer) -> list[W]:
        """Return the chosen weights that an optimizer moves."""
        return [] if self._selection is None else self._selection.owned_by(optimizer)

    def renew(self, weight: W, stepped: bool = False) -> None:
        """Bring a weight up to date, and let the stages after this one know."""
        (self.step if stepped else self.refresh)(weight)
        weight.is_renewed()

    def renew_stale(self) -> None:
        """Bring weights up to date that a load, weight averaging or an earlier stage has changed."""
        for weight in self.weights:
            if weight.is_stale:
                self.renew(weight)

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

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.check_names(pl_module)
        self._known_ends = self.restored.get("ends")
        ends = Ends(trainer, pl_module, self._known_ends)
        wanted = Wanted(self.include, self.exclude, self.label, self.effect, self.why_excluded, self.view)
        chains = self._chains = chains_of(trainer, pl_module)
        self.undo.push(chains.enter(self))
        selection = Selection(pl_module, chains, self.stage, wanted, ends)
        choice = selection.choose()
        self.refuse(trainer, choice)
        self._selection = selection
        self.undo.push(selection.hide)
        selection.show(choice)
        self.chosen = {weight.name: weight.signature for weight in self.weights}
        self.undo_after_saving.push(wrap_saving(pl_module, self.state_key, selection.views))
        self.resume()
        self.say(self.plan)
        rank_zero_info(choice.table(self.column))

    def resume(self) -> None:
        """Start from the restored state, or from the beginning: in ``on_fit_start``, and again in ``on_train_start``."""
        for weight in self.weights:
            self.renew(weight)
        for weight in filter(self.is_as_before, self.weights):
            state = self.restored.get("weights", {}).get(weight.name)
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
        self._chains.renew_stale()
        if self._selection is not None and self.include is None:
            self._selection.ends.watch()

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
        self._learn_ends()

    def _learn_ends(self) -> None:
        if self._selection is None:
            return
        added, dense = self._selection.learn_ends()
        ends = self._selection.ends
        self._known_ends = ends.known
        if added or dense:
            for weight in added:
                self.renew(weight)
            self.chosen = {weight.name: weight.signature for weight in self.weights}
            self.say(ends.explain([w.name for w in dense], [w.name for w in added], self.effect))

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
        ends = self._known_ends
        if ends is None and self.include is None and self._selection is not None and self.has_stepped:
            ends = self._selection.ends.seen()  # an exception in the first batch, after its step
        return {
            **super().state_dict(),
            "weights": {weight.name: weight.state_dict() for weight in self.weights},
            "chosen": self.chosen,
            **({} if ends is None else {"ends": ends}),
        }

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # During a fit the module's own hook does this, later than every callback; after an exception it is gone.
        if self._selection is not None and not len(self.undo_after_saving):
            make_portable(checkpoint, self.state_key, self._selection.views())

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
