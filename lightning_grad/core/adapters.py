"""The base of techniques that train parameters next to frozen weights, such as LoRA."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Generic, TypeVar

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from typing_extensions import override

from lightning_grad.core.averaging import techniques_that_average
from lightning_grad.core.callback import GradCallback
from lightning_grad.core.compatibility import WHOLE_WEIGHTS, Compatibility, no
from lightning_grad.core.dispatch import wrap_method
from lightning_grad.core.fit import during_fit, until_next_fit
from lightning_grad.core.views.adapted_layer import Adapter, adapters_of
from lightning_grad.core.views.portable import wrap_loading, wrap_saving
from lightning_grad.core.views.weight_choice import FoundWeight, found_weights, replaced_weights
from lightning_grad.core.views.weight_view import WeightView
from lightning_grad.utilities.checks import owned_ids
from lightning_grad.utilities.parameters import all_names, as_names, check_patterns, clean_name, matches, named_owners
from lightning_grad.utilities.reporting import counted, format_table

A = TypeVar("A", bound=Adapter)
_MOST_SHOWN = 24
_FROZEN = "frozen by the module"
_FIXED = "the state of the optimizer belongs to the parameters that were chosen"


class AdapterCallback(GradCallback, Generic[A]):
    """Trains adapters of chosen weights; all other parameters are frozen until the fit ends.

    Override :meth:`adapter`, which returns the :class:`~lightning_grad.core.Adapter` of a weight.

    The adapters are inserted after ``configure_model`` and after the weights of a checkpoint were
    loaded, but before DDP wraps the module and before ``configure_optimizers``, so the optimizers
    find their parameters. Validation runs with the merged weights. Checkpoints hold the merged
    weights under the plain keys; the state of this callback holds the adapters, and the frozen weights
    bit for bit. When the fit ends for any reason, the module has its own class and keys and the
    merged weights. Weights that are loaded during the fit replace the frozen ones, and their adapters start again.

    A layer that a finetuning callback of Lightning has frozen gets a frozen adapter, which trains
    when that callback unfreezes the layer. Its weight stays frozen.

    Class attributes:

    - ``effect``: an adjective that describes the weights, such as "adapted".

    Args:
        include: Names or wildcards of layers or weights to adapt. Default: all Linear, Conv and
            attention weights, and those of other layers that multiply by a matrix named weight, except
            those that the module itself has frozen.
        exclude: Names or wildcards of parameters or modules that get no adapter and stay frozen.
        also_train: Names or wildcards of parameters or modules that train as they are, such as a new head.
        name: Name of this instance, needed if two of a class are used; part of state and log keys.
    """

    effect: ClassVar[str] = "adapted"
    compatibility: ClassVar[Compatibility] = GradCallback.compatibility.but(
        weight_averaging=no(
            "trains adapters that are not in the state dict, and {} saves averages of the state dict",
            "Remove one of the two callbacks",
        ),
        **WHOLE_WEIGHTS,
    )
    fixed_settings: ClassVar[Mapping[str, str]] = {"include": _FIXED, "exclude": _FIXED, "also_train": _FIXED}

    adapters = during_fit.of(list[A])
    """The adapters, in module order."""
    _after = until_next_fit.of(dict[str, dict[str, Any]])  # states of the adapters after the fit
    restored = until_next_fit[Mapping[str, Any]](lambda _: {})
    _others = until_next_fit.of(list[str]).saved()  # what else the fit can change: trained parameters and buffers
    _frozen = during_fit.of(dict[nn.Parameter, bool])  # what requires_grad was

    def __init__(
        self,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        also_train: Sequence[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self.include = as_names(include)
        self.exclude = as_names(exclude)
        self.also_train = as_names(also_train)

    # Methods for techniques to override.

    def adapter(self, found: FoundWeight) -> A | str:
        """Return the adapter of a weight, or the reason why the technique skips the weight."""
        raise NotImplementedError(f"{type(self).__name__} must define adapter(found).")

    def select(self, trainer: pl.Trainer, adapters: list[A]) -> tuple[list[A], list[tuple[str, str]]]:
        """Return which of all adapters are used, and the names of the other weights with the reasons.

        Override it if the choice depends on all weights together.
        """
        return adapters, []

    @property
    def is_on(self) -> bool:
        """Whether there are adapters in a fit; otherwise nothing is frozen."""
        return True

    @property
    def plan(self) -> str:
        """A clause about what it does in this fit, printed when the fit begins."""
        count = sum(parameter.numel() for adapter in self.adapters for parameter in adapter.own.values())
        return f"trains adapters of {counted(len(self.adapters), 'weight')} with {count:,} parameters"

    # The fit begins.

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.fitting and self.is_on:
            self.undo.push(wrap_loading(pl_module, self.state_key))

            def insert(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
                self._insert(trainer, pl_module)
                return inner(*args, **kwargs)

            # No hook is after configure_model and loaded weights, but before DDP and the optimizers.
            self.undo.push(wrap_method(trainer.strategy, "setup", insert))

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        if self.is_on and state.get("is_merged"):
            raise ValueError(
                f"{self.display_name} cannot resume from a checkpoint that was saved after the fit, when the adapters had "
                "been merged into the weights. Resume from one that was saved during the fit, or load its weights into "
                "the module and start a new fit."
            )
        self.restored = state
        self._load()

    def _load(self) -> None:
        saved = self.restored.get("adapters", {})
        for adapter in self.adapters:
            if clean_name(adapter.name) in saved:
                adapter.load_state_dict(saved[clean_name(adapter.name)])

    def _insert(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        given = {"include": self.include, "exclude": self.exclude, "also_train": self.also_train}
        check_patterns(pl_module, self.display_name, **given)
        waits = _has_finetuning(trainer)
        if not waits:
            self._refuse_frozen(trainer, pl_module)
        found, skipped = self._choose(trainer, pl_module, waits)
        chosen, others = self.select(trainer, found)
        skipped += others
        if not chosen:
            raise ValueError(f"{self.display_name} found no weight to adapt. {_why_none(skipped)}")
        for adapter in chosen:
            was_trained = self._was_trained(trainer, adapter.frozen)
            self._frozen[adapter.frozen] = was_trained
            # Removed after callbacks have saved, so checkpoints after an exception hold merged weights too.
            self.undo_after_saving.push(adapter.detach)
            adapter.attach()
            self.adapters.append(adapter)
            for parameter in adapter.own.values():
                parameter.requires_grad_(was_trained or not waits)
        self._freeze(trainer, pl_module)
        self.undo_after_saving.push(wrap_saving(pl_module, self.state_key, partial(self._views, pl_module)))
        self.undo_after_saving.push(self._keep_states)
        self._load()
        rows = [[clean_name(a.name), "x".join(map(str, a.shape)), str(a)] for a in self.adapters]
        rows += [[name, "-", f"none: {reason}"] for name, reason in skipped]
        more = f"\n... and {len(rows) - _MOST_SHOWN} more" if len(rows) > _MOST_SHOWN else ""
        rank_zero_info(format_table(rows[:_MOST_SHOWN], ["weight", "shape", "adapter"]) + more)

    def _was_trained(self, trainer: pl.Trainer, weight: nn.Parameter) -> bool:
        """Return whether a weight trained before any instance froze it."""
        others: Sequence[Any] = trainer.callbacks  # type: ignore[attr-defined]
        known = [other._frozen[weight] for other in others if weight in getattr(other, "_frozen", ())]
        return known[0] if known else weight.requires_grad

    def _choose(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, waits: bool
    ) -> tuple[list[A], list[tuple[str, str]]]:
        """Return the adapters, not attached yet, and the skipped weights with the reasons."""
        chosen: list[A] = []
        skipped: list[tuple[str, str]] = []
        others = {clean_name(adapter.name) for adapter in adapters_of(pl_module)}
        own = {id(parameter) for adapter in adapters_of(pl_module) for parameter in adapter.own.values()}
        for found in found_weights(pl_module, list(named_owners(pl_module)), self):
            name = clean_name(found.name)
            if id(found.parameter) in own or matches(found.names, self.also_train or []):
                continue
            reason = self.why_not(found)
            if not reason and self.include is None and not (waits or self._was_trained(trainer, found.parameter)):
                reason = f"{_FROZEN}; include it by name to adapt it nevertheless"
            if not reason and name in others:
                raise ValueError(
                    f"{self.display_name} and another technique both choose {name}. Separate them: set include= or "
                    "exclude=."
                )
            adapter = reason or self.adapter(found)
            if isinstance(adapter, str):
                skipped.append((name, adapter))
            else:
                chosen.append(adapter)
        replaced = [name for name in replaced_weights(pl_module) if matches(name, self.include or ["*"])]
        return chosen, [*skipped, *((name, "reparametrized by pruning, weight_norm or similar") for name in replaced)]

    def why_excluded(self, names: Sequence[str]) -> str:
        """Return why a parameter with these names is excluded; empty if it is not."""
        return "excluded" if matches(names, self.exclude or []) else ""

    def why_not(self, found: FoundWeight) -> str:
        """Return why a weight gets no adapter; empty if it can get one."""
        if reason := self.why_excluded(found.names):
            return reason
        parameter = found.parameter
        if isinstance(parameter, UninitializedParameter):
            return "no shape yet (a lazy module); run one batch through it before the fit"
        if parameter.ndim < 2 or not parameter.is_floating_point():
            return "only floating-point weights with two or more dimensions get an adapter"
        if found.twins:
            tied = [name for name in found.names if name != clean_name(found.name)]
            return f"tied to {', '.join(tied)}, which would not see the adapter"
        return ""

    def _freeze(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Freeze all parameters but adapters and what is to train as it is, for all instances."""
        callbacks: Sequence[object] = trainer.callbacks  # type: ignore[attr-defined]
        free = [p for c in callbacks if isinstance(c, AdapterCallback) and c.is_on for p in c.also_train or []]
        own = {id(parameter) for adapter in adapters_of(pl_module) for parameter in adapter.own.values()}
        names = all_names(pl_module)
        trained = {key for key, known in names.items() if matches(known, free)}
        for parameter in pl_module.parameters():
            if id(parameter) not in own | trained:
                self._frozen.setdefault(parameter, parameter.requires_grad)
                parameter.requires_grad_(False)
        self.undo_after_saving.push(self._unfreeze)
        trained -= {id(parameter) for parameter in self._frozen}
        self._others = sorted(names[key][0] for key in trained if key not in own)
        self._others += [clean_name(name) for name in _persistent_buffers(pl_module)]

    def _refuse_frozen(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise if all that a pattern of ``also_train`` matches is frozen, so it would not train."""
        names = all_names(pl_module)
        for pattern in self.also_train or []:
            matched = [p for p in pl_module.parameters() if matches(names[id(p)], [pattern])]
            if not any(self._was_trained(trainer, parameter) for parameter in matched):
                raise ValueError(
                    f"{self.display_name}(also_train=...): the module has frozen {pattern!r}. Call requires_grad_(True) on it "
                    "before the fit, or remove it from also_train."
                )

    def _unfreeze(self) -> None:
        for parameter, was in self._frozen.items():
            parameter.requires_grad_(was)

    def _keep_states(self) -> None:
        self._after = self._states()

    def _states(self) -> dict[str, dict[str, Any]]:
        return {clean_name(adapter.name): adapter.state_dict() for adapter in self.adapters}

    def _views(self, pl_module: pl.LightningModule) -> dict[str, tuple[Tensor, WeightView]]:
        kept = {id(adapter.frozen): adapter for adapter in self.adapters if adapter.keeps_weight}
        named = pl_module.named_parameters(remove_duplicate=False)  # a layer that is used twice has two names
        return {name: (p.detach(), kept[id(p)]) for name, p in named if id(p) in kept}

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.is_on:
            self.announce("does nothing at this setting", "parameters")
            return
        if trainer.ckpt_path and not self.restored:
            raise ValueError(
                f"{self.display_name} cannot continue a run that trained without it, whose optimizer holds no state of "
                "adapters. Load the weights of the checkpoint into the module, and start a fit without ckpt_path."
            )
        self._refuse_pruners(trainer)
        owned: set[int] = set().union(*map(owned_ids, trainer.optimizers))
        missed = [a for a in self.adapters for p in a.own.values() if p.requires_grad and id(p) not in owned]
        if missed:
            raise ValueError(
                f"{self.display_name} trains an adapter of {clean_name(missed[0].name)}, but no optimizer holds it, because "
                "configure_optimizers chooses parameters by name or by layer. Give an optimizer all parameters that "
                "require a gradient: [p for p in self.parameters() if p.requires_grad]."
            )
        self.announce(self.plan, "parameters", [clean_name(adapter.name) for adapter in self.adapters])

    def _refuse_pruners(self, trainer: pl.Trainer) -> None:
        chosen = {id(adapter.frozen): clean_name(adapter.name) for adapter in self.adapters}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            for layer, attribute in getattr(callback, "_parameters_to_prune", None) or []:
                name = chosen.get(id(layer._parameters.get(attribute)))
                if name is not None:
                    kind = type(callback).__name__
                    raise ValueError(
                        f"{self.display_name} and {kind} would both change {name}. Keep one of them, or set "
                        f"{self.display_name}(exclude=[{name!r}]) or {kind}(parameters_to_prune=[...]) with other layers."
                    )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        averaging = techniques_that_average(trainer) if self.is_on else []  # they know it only now
        if averaging:
            raise ValueError(
                f"{self.display_name} trains adapters that are not in the state dict, and {averaging[0]} saves averages of "
                "the state dict. Remove one of the two."
            )

    # One training step.

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self._leave_inference()
        for parameter in self._frozen:
            if parameter.requires_grad:  # a finetuning callback unfroze the layer
                self._frozen[parameter] = True
                parameter.requires_grad_(False)

    # Validation and checkpoints.

    @override
    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if self.fitting:
            for adapter in self.adapters:
                adapter.enter_inference()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._leave_inference()

    def _leave_inference(self) -> None:
        for adapter in self.adapters:
            adapter.leave_inference()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._leave_inference()

    @override
    def state_dict(self) -> dict[str, Any]:
        own = {"adapters": self._after or self._states(), "is_merged": bool(self._after)}
        return {**super().state_dict(), **own}


def _has_finetuning(trainer: pl.Trainer) -> bool:
    callbacks: Sequence[object] = trainer.callbacks  # type: ignore[attr-defined]
    return any(kind.__name__ == "BaseFinetuning" for callback in callbacks for kind in type(callback).__mro__)


def _persistent_buffers(module: nn.Module) -> Iterator[str]:
    for prefix, child in module.named_modules():
        for name in child._buffers.keys() - child._non_persistent_buffers_set:
            if child._buffers[name] is not None:
                yield f"{prefix}.{name}" if prefix else name


def _why_none(skipped: Sequence[tuple[str, str]]) -> str:
    if not skipped:
        return "It adapts Linear, Conv and attention layers, and other layers that multiply by a matrix named weight."
    reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped[:8])
    frozen = [name for name, reason in skipped if reason.startswith(_FROZEN)]
    if frozen:
        return f"{reasons}. To adapt frozen layers, name them, such as include={frozen[:1]!r}."
    return f"{reasons}. Choose other layers with include=."
