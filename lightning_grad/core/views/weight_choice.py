"""Which weights of a module a technique takes, why it leaves others, and how the choice changes after the first batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import lightning.pytorch as pl
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer

from lightning_grad.core.views.found_weight import FoundWeight, found_weights, replaced_weights
from lightning_grad.core.views.module_chains import ModuleChains
from lightning_grad.core.views.network_ends import Ends, Owner
from lightning_grad.core.views.weight_chain import Chain, Stage, ViewedWeight
from lightning_grad.utilities.checks import owned_ids
from lightning_grad.utilities.parameters import clean_name, matches, named_owners
from lightning_grad.utilities.reporting import format_table

W = TypeVar("W", bound=ViewedWeight)

_MOST_SHOWN = 24
_FROZEN = "frozen"
_REPLACED = "reparametrized (pruning, weight_norm, spectral_norm or parametrize), so that it is computed from others"


@dataclass(frozen=True)
class Wanted(Generic[W]):
    """What a technique looks for.

    Args:
        include: Name patterns; ``None`` means every Linear, Conv and attention weight, and other matrices that their layer
            multiplies by, but the first and the last.
        exclude: Name patterns of what stays as it is.
        label: Who asks, for errors.
        effect: What it makes of a weight, as an adjective.
        why_excluded: Returns why a parameter of some names is left out, empty if it is not.
        view: Makes of a weight what the technique makes of it, or returns why it is left out.
    """

    include: Sequence[str] | None
    exclude: Sequence[str] | None
    label: str
    effect: str
    why_excluded: Callable[[Sequence[str]], str]
    view: Callable[[FoundWeight], W | str]

    def excludes(self, names: Sequence[str]) -> bool:
        """Return whether the user excludes a parameter of these names."""
        return matches(names, self.exclude or [])


@dataclass(frozen=True)
class WeightChoice(Generic[W]):
    """Which weights of a module are chosen, and why others are not."""

    chosen: list[W] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def table(self, column: str) -> str:
        """Return a row for each weight: what is made of it, or why it is skipped."""
        rows = [[clean_name(w.name), "x".join(map(str, w.parameter.shape)), str(w)] for w in self.chosen]
        rows += [[name, "dense", reason] for name, reason in self.skipped]
        more = f"\n... and {len(rows) - _MOST_SHOWN} more" if len(rows) > _MOST_SHOWN else ""
        return format_table(rows[:_MOST_SHOWN], ["weight", "shape", column]) + more

    def why_none(self, effect: str, column: str) -> str:
        """Return why nothing was chosen, and what to do."""
        if not self.skipped:
            return (
                "It looks for Linear, Conv and attention layers, and for others that multiply by a matrix named weight. Name "
                "parameters of other modules in full, such as include=['blocks.*.w1']."
            )
        reasons = [f"{name}: {reason}" for name, reason in self.skipped[:8]]
        frozen = [name for name, reason in self.skipped if reason.startswith(_FROZEN)]
        if frozen:
            return (
                f"{'; '.join(reasons)}. To choose frozen layers, name them, such as include={frozen[:1]!r}: they become "
                f"{effect}, and stay so when a callback unfreezes them."
            )
        return f"{'; '.join(reasons)}. Choose other layers with include=, or another {column}."


def choose_weights(module: nn.Module, wanted: Wanted[W], ends: Ends) -> WeightChoice[W]:
    """Find the weights that a technique takes.

    Args:
        module: The LightningModule, complete.
        wanted: What is looked for.
        ends: Finds the first and the last layers.

    Raises:
        ValueError: What ``wanted.view`` raises.
    """
    owners = list(named_owners(module))
    candidates = list(found_weights(module, owners, wanted.include, wanted.label, wanted.effect))
    dense = _find_ends(owners, candidates, wanted, ends) if wanted.include is None else set()
    choice: WeightChoice[W] = WeightChoice()
    for found in candidates:
        if any(weight.parameter is found.parameter for weight in choice.chosen):
            continue  # another name of a tied parameter
        weight = _why_not(found, wanted) or _view(found, wanted)
        if not isinstance(weight, str) and clean_name(found.name) in dense:
            weight = "the first and the last layer stay dense unless include names them"
        if isinstance(weight, str):
            choice.skipped.append((clean_name(found.name), weight))
        else:
            choice.chosen.append(weight)
    _explain_others(choice, module, wanted, candidates)
    return choice


def _why_not(found: FoundWeight, wanted: Wanted[W]) -> str:
    """Return why a candidate is left out whatever the technique makes of it; empty if it is not."""
    parameter, by_default = found.parameter, wanted.include is None
    excluded = wanted.why_excluded(found.names)
    if excluded:
        return excluded
    if isinstance(parameter, UninitializedParameter):
        return "it has no shape yet (a lazy module): run one batch through it before the fit"
    if parameter.ndim < 2 or not parameter.is_floating_point():
        return "only floating weights of two or more dimensions are chosen"
    if by_default and not parameter.requires_grad:
        return f"{_FROZEN}; include it by name to make it {wanted.effect} all the same"
    tied_to = [name for name in found.names if name != clean_name(found.name) and found.twins]
    if by_default and tied_to:
        return f"tied to {', '.join(tied_to)}; include it by name to make every use {wanted.effect}"
    return ""


def _view(found: FoundWeight, wanted: Wanted[W]) -> W | str:
    weight: object = wanted.view(found)
    if not isinstance(weight, (ViewedWeight, str)):
        raise TypeError(
            f"{wanted.label}.view must return a ViewedWeight, or the reason why {clean_name(found.name)} is left out; got "
            f"{type(weight).__name__}."
        )
    return weight  # type: ignore[return-value]


def _find_ends(owners: Sequence[Owner], candidates: Sequence[FoundWeight], wanted: Wanted[W], ends: Ends) -> set[str]:
    able = [found for found in candidates if found.parameter.requires_grad and not wanted.excludes(found.names)]
    able_names = {found.name for found in able}
    left_out = {found.name for found in candidates} - able_names
    layers = [owner for owner in owners if owner[0] in able_names or (_is_layer(owner) and owner[0] not in left_out)]
    return ends.find([(found.name, found.module, found.attribute) for found in able], layers)


def _is_layer(owner: Owner) -> bool:
    """Return whether a parameter is the weight of a single layer, and not a table of a whole network."""
    parameter = owner[1]._parameters[owner[2]]
    if parameter is None or isinstance(parameter, UninitializedParameter):
        return False
    return parameter.ndim >= 2 and next(owner[1].children(), None) is None


def _explain_others(
    choice: WeightChoice[W], module: nn.Module, wanted: Wanted[W], candidates: Sequence[FoundWeight]
) -> None:
    """Name weights that something else has replaced, and what the user includes that is no weight."""
    replaced = [name for name in replaced_weights(module) if not wanted.excludes([name])]
    choice.skipped.extend((name, _REPLACED) for name in replaced if matches(name, wanted.include or ["*"]))
    for asked in wanted.include or []:
        if not any(matches(names, [asked]) for names in (*(found.names for found in candidates), *replaced)):
            choice.skipped.append((asked, "no Linear, Conv or attention layer; spell parameters of others to the end"))


def refuse_pruners(callbacks: Iterable[object], weights: Sequence[ViewedWeight], technique: str, verb: str) -> None:
    """Raise if another callback, such as Lightning's ``ModelPruning``, is to prune one of the weights.

    Args:
        callbacks: All of the trainer, set up.
        weights: The weights that are chosen.
        technique: Who chooses them.
        verb: What it would do with them.

    Raises:
        ValueError: With the names of both and of the first weight.
    """
    chosen: Mapping[int, str] = {id(weight.parameter): clean_name(weight.name) for weight in weights}
    for callback in callbacks:
        for pair in getattr(callback, "_parameters_to_prune", None) or []:
            module, attribute = pair
            name = chosen.get(id(module._parameters.get(attribute)))
            if name is not None:
                kind = type(callback).__name__
                raise ValueError(
                    f"{technique} and {kind} would both {verb} {name}. Keep one of them, or separate them: "
                    f"exclude=[{name!r}] for {technique}, or {kind}(parameters_to_prune=[...]) with other layers."
                )


class Selection(Generic[W]):
    """Chooses weights, and lets them join the chains of the module.

    It is kept after an exception, for the checkpoints that are saved then. A copy belongs to no fit, and is None.

    Args:
        pl_module: The module.
        chains: Its chains.
        stage: Where the technique stands in them.
        wanted: What it looks for.
        ends: Finds the layers that it leaves alone by default.
    """

    def __init__(
        self, pl_module: pl.LightningModule, chains: ModuleChains, stage: Stage, wanted: Wanted[W], ends: Ends
    ) -> None:
        self._pl_module = pl_module
        self._chains = chains
        self._stage = stage
        self._wanted = wanted
        self.ends = ends
        self.weights: list[W] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()

    def choose(self) -> WeightChoice[W]:
        """Choose weights, by the ends as they are known; nothing is shown yet."""
        return choose_weights(self._pl_module, self._wanted, self.ends)

    def show(self, choice: WeightChoice[W]) -> None:
        """Show the module the chosen weights."""
        self.weights = choice.chosen
        for weight in self.weights:
            self._chains.join(self._stage, weight)

    def hide(self) -> None:
        """Take all views and hooks away; the weights stay known."""
        self.ends.stop()
        for weight in self.weights:
            weight.chain.hide(self._stage)

    def learn_ends(self) -> tuple[list[W], list[W]]:
        """Choose again once the first batch has shown which layers it reaches first and last.

        Returns:
            tuple: Weights that are shown from now on, and those that are dense from now on.
        """
        if not self.ends.learn():
            return [], []
        before = {weight.name: weight for weight in self.weights}
        chosen = [before.get(w.name, w) for w in self.choose().chosen if w.name in before or self._is_free(w)]
        if not chosen:
            return [], []  # nothing but ends: better the layers of the start than none
        kept = {weight.name for weight in chosen}
        dense = [weight for weight in self.weights if weight.name not in kept]
        added = [weight for weight in chosen if weight.name not in before]
        for weight in dense:
            self._chains.drop(self._stage, weight)
        for weight in added:
            self._chains.join(self._stage, weight)
        self.weights = chosen
        return added, dense

    def _is_free(self, weight: W) -> bool:
        return not self._chains.is_taken(weight.found, self._stage)

    def owned_by(self, optimizer: Optimizer) -> list[W]:
        """Return the weights that an optimizer moves."""
        owned = owned_ids(optimizer)
        return [weight for weight in self.weights if id(weight.parameter) in owned]

    def views(self) -> dict[str, tuple[Tensor, Chain]]:
        """Return dense weight and chain by every key of ``state_dict``, where this technique's stage is the first.

        Whichever techniques stand in a chain, one of them puts its residual into a checkpoint. A shared parameter has
        several keys.
        """
        first = {id(w.parameter): w.chain for w in self.weights if w.chain.stages[0] is self._stage}
        named = self._pl_module.named_parameters(remove_duplicate=False)
        return {name: (first[id(p)].dense, first[id(p)]) for name, p in named if id(p) in first}


def _nothing() -> None:
    return None
