"""The base of callbacks whose module computes with other weights than those that train: sparse, quantized, noisy.

The optimizer, DDP and weight averaging keep the dense weight. The module computes with a view of
it, which the technique defines: it derives from :class:`WeightCallback` and writes ``view``, which
returns a :class:`~lightning_grad.core.views.weight_chain.ViewedWeight` for each weight that it acts
on. The rest is here and in the folder ``views``.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Generic

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_grad.core.callback import Chosen, GradCallback
from lightning_grad.core.compatibility import WHOLE_WEIGHTS, Compatibility
from lightning_grad.core.fit import during_fit, until_next_fit
from lightning_grad.core.views.network_ends import Ends
from lightning_grad.core.views.portable import make_portable, wrap_loading, wrap_saving
from lightning_grad.core.views.weight_chain import Chain, ModuleChains, Stage, chains_of
from lightning_grad.core.views.weight_choice import FoundWeight, W, WeightChoice, choose_weights, refuse_pruners
from lightning_grad.functional.gradients.shards import reshard, sharded_dims
from lightning_grad.functional.gradients.tensor_lists import is_sharded
from lightning_grad.utilities.checks import owned_ids
from lightning_grad.utilities.parameters import as_names, check_patterns, clean_name, matches
from lightning_grad.utilities.reporting import counted, listed


class ChosenWeights(list[W]):
    """The weights that a technique chose in a fit. A pickle or copy is empty, because it belongs to no fit."""

    def __reduce__(self) -> tuple[Any, ...]:
        return list, ()


class WeightCallback(GradCallback, Generic[W]):
    """Replaces weights of a module with the results of :meth:`view`.

    It chooses the weights, attaches their views, refreshes them when an optimizer, a load or weight
    averaging changes the dense weights, and removes everything at the end of the fit. Validation
    and checkpoints use ``ViewedWeight.stored``: a checkpoint loads into the plain module, and a
    resumed run continues from the dense weights bit for bit. At the end of the fit the stored
    weights become the module's own; after an exception the module keeps its dense weights.

    Several techniques may act on the same weight, each in its own ``stage``; the order of the
    callbacks does not matter. The difference between the dense and the stored weight is in the
    state of the technique with the first stage. Without that technique, a run resumes from the
    stored weights.

    Class attributes:

    - ``stage``: its position among techniques that act on the same weight.
    - ``effect``: an adjective for the resulting weights, such as sparse.
    - ``verb``: what it does with a weight, such as prune.
    - ``column``: heading of the column of the table of weights that describes each one.

    Args:
        include: Names or wildcards of layers or weights. Default: all but the first and last layer.
            These are every Linear, Conv1d/2d/3d, attention projection and other layer that
            multiplies by a matrix named weight, except the first and the last that the first batch
            reaches. Parameters of other modules need their full name.
        exclude: Names or wildcards of parameters or modules to skip.
        name: Name of this instance, needed if two of a class are used; part of state and log keys.
    """

    stage: ClassVar[Stage]
    effect: ClassVar[str]
    verb: ClassVar[str] = "change"
    column: ClassVar[str] = "effect"
    compatibility: ClassVar[Compatibility] = GradCallback.compatibility.but(**WHOLE_WEIGHTS)

    weights = until_next_fit[list[W]](lambda _: ChosenWeights())
    """The chosen weights, in module order. They are kept after an exception, for checkpoints that are saved then."""
    signatures = until_next_fit.of(dict[str, list[str | int]])  # of each chosen weight
    restored = until_next_fit[Mapping[str, Any]](lambda _: {})
    has_stepped = until_next_fit.of(bool)
    _chains = during_fit[ModuleChains]()
    _ends = during_fit[Ends | None](lambda _: None)
    _known_ends = until_next_fit[list[str] | None](lambda _: None)
    _resumed = during_fit.of(dict[str, dict[str, Any]])  # restored states of weights, until the first batch

    def __init__(
        self, include: Sequence[str] | None = None, exclude: Sequence[str] | None = None, name: str | None = None
    ) -> None:
        super().__init__(name)
        self.include = as_names(include)
        self.exclude = as_names(exclude)

    # Methods for techniques to override.

    def view(self, found: FoundWeight) -> W | str:
        """Return the view of a weight, or the reason why the technique skips it."""
        raise NotImplementedError(f"{type(self).__name__} must define view(found).")

    def why_excluded(self, names: Sequence[str]) -> str:
        """Return why a parameter with these names is excluded; empty if it is not."""
        return "excluded" if matches(names, self.exclude or []) else ""

    def check_names(self, pl_module: pl.LightningModule) -> None:
        """Raise if a name pattern of the user matches nothing."""
        check_patterns(pl_module, self.display_name, include=self.include, exclude=self.exclude)

    def refuse(self, trainer: pl.Trainer, choice: WeightChoice[W]) -> None:
        """Raise, before any view is attached, if the chosen weights cannot be used."""
        if not choice.chosen:
            why = choice.why_none(self.effect, self.column)
            raise ValueError(f"{self.display_name} found no weight to make {self.effect}. {why}")
        for weight in choice.chosen:
            if self._chains.is_taken(weight.found, self.stage):
                raise ValueError(
                    f"{self.display_name} and another technique both choose {clean_name(weight.name)} "
                    f"({weight.found.class_name()}). Separate them: set include= or exclude=."
                )
            if reason := self._chains.why_not(self.stage, weight):
                raise ValueError(reason)
        for optimizer in trainer.optimizers:
            if not owned_ids(optimizer).isdisjoint(id(weight.parameter) for weight in choice.chosen):
                self.works_with().refuse_optimizer(self.display_name, trainer, optimizer)
        refuse_pruners(trainer.callbacks, choice.chosen, self.display_name, self.verb)  # type: ignore[attr-defined]

    def refuse_shards(self, weight: W, along: Set[int], why: str, way_out: str) -> None:
        """Raise if a weight is sharded along some dimensions, or in a way in which its gradient cannot pass through the view.

        A technique that works with FSDP2 calls it in :meth:`refuse` for each chosen weight. FSDP2 gives gradients to the
        shards itself and calls no hook of theirs, so a view that is written in place cannot change them.

        Args:
            weight: A chosen weight.
            along: Dimensions along which the rule needs the weight whole.
            why: A clause that says so, such as "its groups of 4 lie along dimension 1".
            way_out: What else to do about that, as an imperative.

        Raises:
            ValueError: With the name of the weight.
        """
        name = clean_name(weight.name)
        cut = sorted(along & sharded_dims(weight.parameter))
        if cut:
            raise ValueError(
                f"{self.display_name} cannot work on {name}: {why}, and the weight is sharded along dimension {cut[0]}. "
                f"{way_out}, or exclude it: exclude=[{name!r}]."
            )
        if weight.found.in_place and is_sharded(weight.parameter) and not weight.passes_gradient:
            reason = "several layers share it" if weight.found.twins else "its layer is not one of torch's"
            raise ValueError(
                f"{self.display_name} cannot work on {name}: with these settings it changes gradients of the weight, which "
                f"it writes in place, because {reason}, and the weight is sharded. Exclude it: exclude=[{name!r}]; or "
                "train with strategy='ddp'."
            )

    @property
    def plan(self) -> str:
        """A clause about what it does in this fit, printed when the fit begins."""
        return f"makes {counted(len(self.weights), 'weight')} {self.effect}"

    def refresh(self, weights: Sequence[W]) -> None:
        """Recompute the views of weights that are new or were changed from outside."""
        for weight in weights:
            weight.refresh()

    def step(self, weights: Sequence[W]) -> None:
        """Update the views of the weights that an optimizer has stepped."""
        for weight in weights:
            weight.step()

    def settle(self, trainer: pl.Trainer) -> Sequence[W]:
        """Return the weights whose stored values become the module's own when the fit ends without an exception."""
        return self.weights if trainer.global_step > 0 or self.has_stepped else []

    # The chosen weights.

    def owned_by(self, optimizer: Optimizer) -> list[W]:
        """Return the chosen weights that an optimizer trains."""
        owned = owned_ids(optimizer)
        return [weight for weight in self.weights if id(weight.parameter) in owned]

    def views(self, pl_module: pl.LightningModule) -> dict[str, tuple[Tensor, Chain]]:
        """Return the dense weights and chains, by state-dict key, in which this technique's stage is the first.

        This way exactly one technique of a chain saves its residual. A shared parameter has several
        keys.
        """
        reshard(pl_module)
        first = {id(w.parameter): w.chain for w in self.weights if next(iter(w.chain.stages)) is self.stage}
        named = pl_module.named_parameters(remove_duplicate=False)
        return {name: (first[id(p)].dense, first[id(p)]) for name, p in named if id(p) in first}

    def renew(self, weights: Sequence[W], stepped: bool = False) -> None:
        """Update the views of weights and mark the later stages as outdated."""
        (self.step if stepped else self.refresh)(weights)
        for weight in weights:
            weight.is_renewed()

    def renew_stale(self) -> None:
        """Update the views of weights that a load, weight averaging or an earlier stage changed."""
        stale = [weight for weight in self.weights if weight.is_stale]
        dense_as_before = [weight for weight in stale if not weight.is_changed]
        self.renew(stale)
        for weight in dense_as_before:
            self._load_state(weight)  # an earlier stage started after this one, so the restored state is loaded again

    # The fit begins.

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.fitting:
            self.undo.push(wrap_loading(pl_module, self.state_key))

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self.restored = state
        if self.weights:
            self.resume()

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.check_names(pl_module)
        ends = self._ends = Ends(trainer, pl_module, self.restored.get("ends"))
        self._chains = chains_of(trainer, pl_module)
        self.undo.push(self._chains.enter(self))
        choice = choose_weights(pl_module, self, ends)
        self.refuse(trainer, choice)
        self.undo.push(partial(self._hide, ends))
        self.weights[:] = choice.chosen
        for weight in self.weights:
            self._chains.join(self.stage, weight)
        self.signatures = {weight.name: weight.signature for weight in self.weights}
        self.undo_after_saving.push(wrap_saving(pl_module, self.state_key, partial(self.views, pl_module)))
        self.resume()
        self.announce(self.plan, "parameters", self._names)
        rank_zero_info(choice.table(self.column))

    def _hide(self, ends: Ends) -> None:
        """Remove all views and hooks; keep the list of weights."""
        self._note_ends()
        ends.stop()
        for weight in self.weights:
            weight.chain.hide(self.stage)

    def warn_of_others(
        self, trainer: pl.Trainer, names: Sequence[str], count: int, began: str, consequence: str = ""
    ) -> None:
        """Warn outside of a fit if the module has other weights than the technique ends with.

        Args:
            trainer: The trainer.
            names: Names of these weights; without any, there is no warning.
            count: Number of all weights of the technique.
            began: What must have begun, so a checkpoint has the right weights.
            consequence: A clause that begins with a comma.
        """
        if names:
            whose = f"the checkpoint {trainer.ckpt_path}" if trainer.ckpt_path else "the module"
            rank_zero_warn(
                f"{self.display_name}: {len(names)} of its {count} weights are not {self.effect} in {whose} "
                f"({listed(names, 3)}){consequence}. Use a checkpoint from after {began} began, or the module as it was "
                "after the fit."
            )

    @override
    def chosen(self) -> Chosen:
        return replace(super().chosen(), words=self.plan, names=self._names)  # the first batch can change the choice

    @property
    def _names(self) -> list[str]:
        return [clean_name(weight.name) for weight in self.weights]

    def resume(self) -> None:
        """Start from the restored state, if any. Called in ``on_fit_start`` and again in ``on_train_start``."""
        self.renew(self.weights)
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
        """Return True if the restored state fits the weight. It may not, because settings may change on resume."""
        return bool(self.restored.get("chosen", {}).get(weight.name) == weight.signature)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.resume()  # only now are the length of the run and the step at which it resumes known
        self.restored = {}

    # One training step.

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self._leave_inference()
        self._chains.begin_batch()
        self._resumed = {}
        if self._ends is not None and self.include is None:
            self._ends.watch()

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if pl_module.automatic_optimization:
            self._chains.close_window()

    @override
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self._chains.close_window()

    def after_update(self, optimizer: Optimizer) -> None:
        """Correct dense weights that an optimizer has just stepped, before any technique updates its views."""

    @torch.no_grad()
    def after_step(self, trainer: pl.Trainer, optimizer: Optimizer) -> None:
        """Update the views after an optimizer step; techniques are called in the order of their stages."""
        self.has_stepped = True
        self.renew(self.owned_by(optimizer), stepped=True)
        self.renew([weight for weight in self.weights if weight.is_outdated])

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self._chains.close_window()
        if self._ends is not None and self._ends.learn():
            self._choose_again(pl_module, self._ends)

    def _choose_again(self, pl_module: pl.LightningModule, ends: Ends) -> None:
        """Choose weights again, after the first batch showed that other layers are the first and the last."""
        before = {weight.name: weight for weight in self.weights}
        found = [before.get(weight.name, weight) for weight in choose_weights(pl_module, self, ends).chosen]
        chosen = [w for w in found if w.name in before or self._is_free(w)]
        added, kept = [weight for weight in chosen if weight.name not in before], set(map(id, chosen))
        dense = [weight for weight in self.weights if id(weight) not in kept]
        if not chosen or not (added or dense):
            return  # every layer is a first or last one: keep the earlier choice rather than none
        for weight in dense:
            self._chains.drop(self.stage, weight)
        self.weights[:] = chosen
        for weight in added:
            self._chains.join(self.stage, weight)
        self.renew(added)
        self.signatures = {weight.name: weight.signature for weight in self.weights}
        self.say(ends.explain([w.name for w in dense], [w.name for w in added], self.effect))

    def _is_free(self, weight: W) -> bool:
        return not (self._chains.is_taken(weight.found, self.stage) or self._chains.why_not(self.stage, weight))

    # Validation and checkpoints.

    @override
    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        # Not in on_validation_start: weight averaging swaps its weights in later than that.
        if self.fitting:
            for weight in self.weights:
                weight.chain.enter_inference()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._leave_inference()

    def _leave_inference(self) -> None:
        for weight in self.weights:
            weight.chain.leave_inference()

    @override
    def state_dict(self) -> dict[str, Any]:
        self._note_ends()
        states = {weight.name: weight.state_dict() for weight in self.weights}
        ends = {} if self._known_ends is None else {"ends": self._known_ends}
        return {**super().state_dict(), "weights": states, "chosen": self.signatures, **ends}

    def _note_ends(self) -> None:
        """Store the first and last layers found so far; within the first batch, only after an optimizer step."""
        ends, has_shown = self._ends, self.include is None and self.has_stepped
        if ends is not None and (ends.known is not None or has_shown):
            self._known_ends = ends.seen()

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # During a fit the wrapped hook of the module does this, after all callbacks; after an
        # exception it is removed.
        if self.weights and not len(self.undo_after_saving):
            make_portable(checkpoint, self.state_key, self.views(pl_module))

    # The fit ends.

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._leave_inference()
        if self.fitting and any(weight.stores for weight in self.weights):
            rank_zero_info(
                f"{self.display_name}: {type(exception).__name__} stopped the fit. The module in memory has its dense "
                f"weights; checkpoints that callbacks wrote hold the {self.effect} weights, and resume exactly."
            )

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        chains = self._chains if self.fitting and self.weights else None
        super().teardown(trainer, pl_module, stage)
        if chains is not None:
            chains.bake()
        self.weights = ChosenWeights()
