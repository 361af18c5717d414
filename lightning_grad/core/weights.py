"""The base of the callbacks that show a module other weights than those that train: sparse, quantized, with noise.

The optimizer, DDP and weight averaging keep the dense weight; the module computes with what the technique makes of it. A
technique derives from :class:`WeightCallback` and writes ``view``, which returns a
:class:`~lightning_grad.core.views.weight_chain.ViewedWeight` for each weight that it takes. The rest is here and
in the folder ``views``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_grad.core.callback import Chosen
from lightning_grad.core.fit import until_next_fit
from lightning_grad.core.views.found_weight import FoundWeight
from lightning_grad.core.views.module_chains import chains_of, refuse_taken
from lightning_grad.core.views.network_ends import Ends
from lightning_grad.core.views.portable import wrap_saving
from lightning_grad.core.views.shown_weights import ShownWeights
from lightning_grad.core.views.weight_choice import Selection, W, Wanted, WeightChoice, refuse_pruners
from lightning_grad.utilities.checks import owned_ids
from lightning_grad.utilities.parameters import as_names, check_patterns, clean_name, matches
from lightning_grad.utilities.reporting import counted


class WeightCallback(ShownWeights[W]):
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

    verb: ClassVar[str] = "change"
    column: ClassVar[str] = "effect"

    signatures = until_next_fit.of(dict[str, list[str | int]])  # of each chosen weight
    _known_ends = until_next_fit[list[str] | None](lambda _: None)

    def __init__(
        self, include: Sequence[str] | None = None, exclude: Sequence[str] | None = None, name: str | None = None
    ) -> None:
        super().__init__(name)
        self.include = as_names(include)
        self.exclude = as_names(exclude)

    # What a technique writes.

    def view(self, found: FoundWeight) -> W | str:
        """Return what the technique makes of a weight, or the reason why it leaves it as it is."""
        raise NotImplementedError(f"{type(self).__name__} must define view(found).")

    def why_excluded(self, names: Sequence[str]) -> str:
        """Return why a parameter of some names is left out; empty if it is not."""
        return "excluded" if matches(names, self.exclude or []) else ""

    def check_names(self, pl_module: pl.LightningModule) -> None:
        """Raise if a name pattern of the user matches nothing."""
        check_patterns(pl_module, self.label, include=self.include, exclude=self.exclude)

    def refuse(self, trainer: pl.Trainer, choice: WeightChoice[W]) -> None:
        """Raise if the chosen weights cannot be shown, before any is."""
        if not choice.chosen:
            why = choice.why_none(self.effect, self.column)
            raise ValueError(f"{self.label} finds no weight to make {self.effect}. {why}")
        refuse_taken(self._chains, self.stage, choice.chosen, self.label)
        for optimizer in trainer.optimizers:
            if not owned_ids(optimizer).isdisjoint(id(weight.parameter) for weight in choice.chosen):
                self.works_with().refuse_optimizer(self.label, trainer, optimizer)
        refuse_pruners(trainer.callbacks, choice.chosen, self.label, self.verb)  # type: ignore[attr-defined]

    @property
    def plan(self) -> str:
        """What it will do in this fit, for the line that is printed when it begins."""
        return f"makes {counted(len(self.weights), 'weight')} {self.effect}"

    # The fit begins.

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
        self.signatures = {weight.name: weight.signature for weight in self.weights}
        self.undo_after_saving.push(wrap_saving(pl_module, self.state_key, self.views))
        self.resume()
        self.announce(self.plan, "parameters", self._names)
        rank_zero_info(choice.table(self.column))

    @override
    def chosen(self) -> Chosen:
        return replace(super().chosen(), words=self.plan, names=self._names)  # the first batch may change the choice

    @property
    def _names(self) -> list[str]:
        return [clean_name(weight.name) for weight in self.weights]

    # One training step.

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._selection is not None and self.include is None:
            self._selection.ends.watch()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
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
            self.signatures = {weight.name: weight.signature for weight in self.weights}
            self.say(ends.explain([w.name for w in dense], [w.name for w in added], self.effect))

    @override
    def state_dict(self) -> dict[str, Any]:
        ends = self._known_ends
        if ends is None and self.include is None and self._selection is not None and self.has_stepped:
            ends = self._selection.ends.seen()  # an exception in the first batch, after its step
        return {
            **super().state_dict(),
            "chosen": self.signatures,
            **({} if ends is None else {"ends": ends}),
        }
