"""The weights of a module that a technique chooses, and the reasons why it skips others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized

from lightning_grad.core.views.network_ends import Ends, Owner
from lightning_grad.core.views.weight_chain import ViewedWeight
from lightning_grad.core.views.weight_view import ADAPTERS, REPLACEMENTS, viewed_class
from lightning_grad.functional.gradients.tensor_lists import is_sharded
from lightning_grad.utilities.parameters import all_names, clean_name, is_spelled, matches, named_owners, selects
from lightning_grad.utilities.reporting import format_table
from lightning_grad.utilities.weight_axes import is_foreign_matrix, output_dimension

_SINGLE_WEIGHT = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class Chooser(Protocol):
    """What a technique says about its choice: a :class:`~lightning_grad.core.WeightCallback`, or another object."""

    @property
    def display_name(self) -> str:
        """Name of the technique, for errors."""

    @property
    def effect(self) -> str:
        """Adjective that describes the resulting weights."""

    @property
    def include(self) -> Sequence[str] | None:
        """Names or wildcards of the weights that it chooses; None for all but the first and the last layer."""

    @property
    def exclude(self) -> Sequence[str] | None:
        """Names or wildcards of the weights that it skips."""

    def why_excluded(self, names: Sequence[str]) -> str:
        """Return why a parameter with these names is excluded; empty if it is not."""


@dataclass(frozen=True)
class FoundWeight:
    """A parameter that can be chosen.

    Args:
        name: Full name, as in ``state_dict``.
        module: Module that owns it.
        attribute: Its name in that module.
        names: All its full names, without the prefix of compiled modules.
        twins: Other owners of the same (tied) parameter, each with its attribute.
        is_known: Whether its module is a torch layer that reads the attribute at every use.
        is_spelled: Whether a pattern of the user names it in full.
        sharded: The parameter, if it is a DTensor. FSDP2 replaces it in its module while that computes.
        display_name: Name of the technique, for errors.
        effect: Adjective that describes the resulting weights.
    """

    name: str
    module: nn.Module
    attribute: str
    names: tuple[str, ...] = ()
    twins: tuple[tuple[nn.Module, str], ...] = ()
    is_known: bool = True
    is_spelled: bool = False
    sharded: nn.Parameter | None = None
    display_name: str = "A technique"
    effect: str = "different"

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter itself, which holds the dense weight.

        Raises:
            RuntimeError: If other code removed it from its layer.
        """
        parameter = self.module._parameters.get(self.attribute)
        if parameter is None:
            raise RuntimeError(
                f"{self.display_name} makes {clean_name(self.name)} {self.effect}, but the parameter was removed from "
                "its layer during the fit, as pruning, weight_norm, spectral_norm and parametrize do. Do that before "
                f"the fit, or exclude the layer: exclude=[{clean_name(self.name)!r}]."
            )
        return parameter if self.sharded is None else self.sharded

    @property
    def in_place(self) -> bool:
        """Whether its view is written into the parameter during a step."""
        return bool(self.twins) or not self.is_known

    def output_dimension(self) -> int | None:
        """Return the output dimension of the weight; ``None`` if the layer computes neither x W nor x W^T."""
        return output_dimension(self.module, self.attribute)

    def class_name(self) -> str:
        """Return the name of the module's original class."""
        return viewed_class(self.module).__name__


def found_weights(module: nn.Module, owners: Sequence[Owner], technique: Chooser) -> Iterator[FoundWeight]:
    """Yield the parameters that a technique can choose, a tied one once for each owner.

    Layers of torch are recognized by their type, other linear layers by a matrix named ``weight``.
    Parameters of other modules are found only if a pattern names them in full.

    Args:
        module: The LightningModule, complete.
        owners: Name, module and attribute of its parameters.
        technique: The technique. With ``include=None`` it can choose all recognized layers.
    """
    known = all_names(module)
    uses: dict[int, list[tuple[nn.Module, str]]] = {}
    for _, owner, attribute in owners:
        uses.setdefault(id(owner._parameters[attribute]), []).append((owner, attribute))
    for name, owner, attribute in owners:
        key = id(owner._parameters[attribute])
        names, twins = tuple(known[key]), tuple(use for use in uses[key] if use != (owner, attribute))
        parameter = owner._parameters[attribute]
        sharded = parameter if parameter is not None and is_sharded(parameter) else None
        kinds = (_is_known(owner, attribute), is_spelled(names, technique.include or []), sharded)
        found = FoundWeight(name, owner, attribute, names, twins, *kinds, technique.display_name, technique.effect)
        if found.is_spelled or (_is_layer(found) and selects(found.names, technique.include)):
            yield found


def _is_known(owner: nn.Module, attribute: str) -> bool:
    if isinstance(owner, nn.MultiheadAttention):
        return attribute in _ATTENTION_WEIGHTS
    return isinstance(owner, _SINGLE_WEIGHT) and attribute == "weight"


def _is_layer(found: FoundWeight) -> bool:
    is_matrix = found.attribute == "weight" and is_foreign_matrix(found.module, found.attribute)
    return found.is_known or is_matrix


def replaced_weights(module: nn.Module) -> list[str]:
    """Return the weights that pruning, a norm or a parametrization has replaced."""
    found = []
    for name, layer in module.named_modules():
        replaced = layer._parameters.keys() & {f"weight_{end}" for end in REPLACEMENTS}
        if isinstance(layer, _SINGLE_WEIGHT) and (replaced or is_parametrized(layer, "weight")):
            found.append(clean_name(f"{name}.weight"))
    return found


if TYPE_CHECKING:
    from lightning_grad.core.weights import WeightCallback

W = TypeVar("W", bound=ViewedWeight)

_MOST_SHOWN = 24
_FROZEN = "frozen"
_REPLACED = "reparametrized by pruning, weight_norm, spectral_norm or parametrize: it is computed from other parameters"


@dataclass(frozen=True)
class WeightChoice(Generic[W]):
    """The chosen weights of a module, and the skipped ones with the reasons."""

    chosen: list[W] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def table(self, column: str) -> str:
        """Return a table with one row per weight: its view, or why it is skipped."""
        rows = [[clean_name(w.name), "x".join(map(str, w.parameter.shape)), str(w)] for w in self.chosen]
        rows += [[name, "-", f"dense: {reason}"] for name, reason in self.skipped]
        more = f"\n... and {len(rows) - _MOST_SHOWN} more" if len(rows) > _MOST_SHOWN else ""
        return format_table(rows[:_MOST_SHOWN], ["weight", "shape", column]) + more

    def why_none(self, effect: str, column: str) -> str:
        """Return why nothing was chosen, and what to do."""
        if not self.skipped:
            return (
                "It chooses Linear, Conv and attention layers, and other layers that multiply by a matrix named "
                "weight. Name parameters of other modules in full, such as include=['blocks.*.w1']."
            )
        reasons = [f"{name}: {reason}" for name, reason in self.skipped[:8]]
        frozen = [name for name, reason in self.skipped if reason.startswith(_FROZEN)]
        if frozen:
            return (
                f"{'; '.join(reasons)}. To choose frozen layers, name them, such as include={frozen[:1]!r}. They "
                f"become {effect}, and stay {effect} when a callback unfreezes them."
            )
        return f"{'; '.join(reasons)}. Choose other layers with include=, or set another {column}."


def choose_weights(module: nn.Module, technique: WeightCallback[W], ends: Ends) -> WeightChoice[W]:
    """Choose the weights of a technique.

    Args:
        module: The LightningModule, complete.
        technique: The technique.
        ends: Finds the first and the last layers.

    Raises:
        ValueError: Raised by ``technique.view``.
    """
    owners = list(named_owners(module))
    candidates = list(found_weights(module, owners, technique))
    dense = find_ends(owners, candidates, technique, ends)
    choice: WeightChoice[W] = WeightChoice()
    taken: set[int] = set()
    for found in candidates:
        if id(found.parameter) in taken:
            continue  # another name of a tied parameter
        weight = why_not(found, technique) or _view(found, technique)
        if not isinstance(weight, str) and clean_name(found.name) in dense:
            weight = "the first and the last layer stay dense unless include names them"
        if isinstance(weight, str):
            choice.skipped.append((clean_name(found.name), weight))
        else:
            choice.chosen.append(weight)
            taken.add(id(weight.parameter))
    _explain_others(choice, module, technique, candidates)
    return choice


def why_not(found: FoundWeight, technique: Chooser) -> str:
    """Return why a candidate is skipped before the technique's ``view`` is called; empty if it is not."""
    parameter, by_default = found.parameter, technique.include is None
    if excluded := technique.why_excluded(found.names):
        return excluded
    adapter = found.module.__dict__.get(ADAPTERS, {}).get(found.attribute)
    if adapter is not None and not adapter.keeps_weight:
        return f"{adapter.found.effect} by {adapter.found.display_name}"
    if isinstance(parameter, UninitializedParameter):
        return "no shape yet (a lazy module); run one batch through it before the fit"
    if parameter.ndim < 2 or not parameter.is_floating_point():
        return "only floating-point weights with two or more dimensions are chosen"
    if by_default and not parameter.requires_grad:
        return f"{_FROZEN}; include it by name to make it {technique.effect} nevertheless"
    tied_to = [name for name in found.names if name != clean_name(found.name) and found.twins]
    if by_default and tied_to:
        return f"tied to {', '.join(tied_to)}; include it by name to make every use {technique.effect}"
    return ""


def _view(found: FoundWeight, technique: WeightCallback[W]) -> W | str:
    weight = technique.view(found)
    if not isinstance(weight, (ViewedWeight, str)):
        raise TypeError(
            f"{technique.display_name}.view must return a ViewedWeight, or the reason why it skips "
            f"{clean_name(found.name)}; got {type(weight).__name__}."
        )
    return weight


def find_ends(owners: Sequence[Owner], candidates: Sequence[FoundWeight], technique: Chooser, ends: Ends) -> set[str]:
    """Return the names of the first and the last weight, which a technique skips; none if ``include`` is set."""
    if technique.include is not None:
        return set()
    able = [c for c in candidates if c.parameter.requires_grad and selects(c.names, None, technique.exclude)]
    names = {found.name for found in able}
    others = {found.name for found in candidates} - names
    layers = [own for own in owners if own[0] in names or (_is_single_layer(own) and own[0] not in others)]
    return ends.find([(found.name, found.module, found.attribute) for found in able], layers)


def _is_single_layer(owner: Owner) -> bool:
    """Return True if a parameter is the weight of a single layer, not a parameter of a whole network."""
    parameter = owner[1]._parameters[owner[2]]
    if parameter is None or isinstance(parameter, UninitializedParameter):
        return False
    return parameter.ndim >= 2 and next(owner[1].children(), None) is None


def _explain_others(
    choice: WeightChoice[W], module: nn.Module, technique: WeightCallback[W], candidates: Sequence[FoundWeight]
) -> None:
    """Add the replaced weights and the patterns that match no weight to the skipped ones."""
    replaced = [name for name in replaced_weights(module) if selects(name, None, technique.exclude)]
    choice.skipped.extend((name, _REPLACED) for name in replaced if matches(name, technique.include or ["*"]))
    for asked in technique.include or []:
        if not any(matches(names, [asked]) for names in (*(found.names for found in candidates), *replaced)):
            choice.skipped.append((asked, "not a Linear, Conv or attention layer; name parameters of others in full"))


def refuse_pruners(callbacks: Iterable[object], weights: Sequence[ViewedWeight], technique: str, verb: str) -> None:
    """Raise if another callback, such as Lightning's ``ModelPruning``, prunes one of the weights.

    Args:
        callbacks: All callbacks of the trainer, after ``setup``.
        weights: The chosen weights.
        technique: Name of the technique.
        verb: The technique's action on them, such as prune.

    Raises:
        ValueError: Names both callbacks and the first such weight.
    """
    chosen: Mapping[int, str] = {id(weight.parameter): clean_name(weight.name) for weight in weights}
    for callback in callbacks:
        for pair in getattr(callback, "_parameters_to_prune", None) or []:
            module, attribute = pair
            name = chosen.get(id(module._parameters.get(attribute)))
            if name is not None:
                kind = type(callback).__name__
                raise ValueError(
                    f"{technique} and {kind} would both {verb} {name}. Keep one of them, or set "
                    f"{technique}(exclude=[{name!r}]) or {kind}(parameters_to_prune=[...]) with other layers."
                )
