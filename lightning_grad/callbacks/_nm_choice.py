"""Which weights of a module are made sparse, and why others are not.

Used by :class:`lightning_grad.callbacks.NMSparsity` alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized

from lightning_grad.callbacks._nm_ends import Ends, Owner
from lightning_grad.callbacks._nm_weight import SparseWeight
from lightning_grad.core.weight_view import REPLACEMENTS, has_view, viewed_class
from lightning_grad.functional import NMPattern
from lightning_grad.functional.nm_sparsity import Axis, group_dim
from lightning_grad.utilities.parameters import (
    all_names,
    check_patterns,
    clean_name,
    first_match,
    is_spelled,
    matches,
    named_owners,
    parameter_names,
)
from lightning_grad.utilities.reporting import counted, format_table
from lightning_grad.utilities.weight_axes import is_foreign_matrix, output_dimension

_SINGLE_WEIGHT = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_MOST_SHOWN = 24
_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_FROZEN = "frozen"
_REPLACED = "reparametrized (pruning, weight_norm, spectral_norm or parametrize), so that it is computed from others"


@dataclass(frozen=True)
class Choice:
    """Which weights of a module are made sparse, and why others are not."""

    chosen: list[SparseWeight]
    skipped: list[tuple[str, str]]

    def table(self) -> str:
        """Return a row for each weight: its pattern, or why it is skipped."""
        rows = [[clean_name(w.name), "x".join(map(str, w.parameter.shape)), str(w.pattern)] for w in self.chosen]
        rows += [[name, "dense", reason] for name, reason in self.skipped]
        more = f"\n... and {len(rows) - _MOST_SHOWN} more" if len(rows) > _MOST_SHOWN else ""
        return format_table(rows[:_MOST_SHOWN], ["weight", "shape", "pattern"]) + more

    def summary(self) -> str:
        """Return in a clause how many weights are made sparse."""
        pruned = sum(weight.pattern.n < weight.pattern.m for weight in self.chosen)
        weights = counted(pruned or len(self.chosen), "weight")
        if not pruned:
            return f"keeps {weights} dense, because N = M prunes nothing"
        return f"makes {weights} sparse"

    def why_none(self) -> str:
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
                "sparse, and stay so when a callback unfreezes them."
            )
        return f"{'; '.join(reasons)}. Choose other layers with include=, or another pattern."


@dataclass(frozen=True)
class Wanted:
    """What the user asked for.

    Args:
        patterns: N:M pattern by name pattern; the first that matches counts.
        axis: Along which dimension the groups lie.
        include: Name patterns; ``None`` means every Linear, Conv and attention weight, and other matrices that their layer
            multiplies by, but the first and the last.
        exclude: Name patterns of what stays dense.
        label: Who asks, for errors.
    """

    patterns: Mapping[str, NMPattern]
    axis: Axis
    include: Sequence[str] | None
    exclude: Sequence[str] | None
    label: str = "NMSparsity"

    def excludes(self, names: Sequence[str]) -> bool:
        """Return whether a parameter of these names stays dense."""
        return matches(names, self.exclude or [])


def choose_weights(module: nn.Module, wanted: Wanted, ends: Ends) -> Choice:
    """Find the weights to make sparse.

    Args:
        module: The LightningModule, complete.
        wanted: What the user asked for.
        ends: Finds the first and the last layers.

    Raises:
        ValueError: If a name pattern matches nothing, or the names of a tied parameter are given different patterns.
    """
    owners, known = list(named_owners(module)), all_names(module)
    _check_names(wanted, parameter_names(module))
    names = {name: known[id(owner._parameters[attribute])] for name, owner, attribute in owners}
    candidates = [owner for owner in owners if _is_candidate(owner, names[owner[0]], wanted.include)]
    dense = _find_ends(owners, candidates, names, wanted, ends) if wanted.include is None else set()
    uses: dict[int, list[tuple[nn.Module, str]]] = {}
    for owner in owners:
        uses.setdefault(id(_parameter(owner)), []).append(owner[1:])
    choice = Choice([], [])
    for candidate in candidates:
        name = candidate[0]
        _take(choice, candidate, names[name], uses[id(_parameter(candidate))], wanted, clean_name(name) in dense)
    replaced = [name for name in _replaced_weights(module) if not wanted.excludes([name])]
    choice.skipped.extend((name, _REPLACED) for name in replaced if matches(name, wanted.include or ["*"]))
    for asked in wanted.include or []:
        if not any(matches(known_by, [asked]) for known_by in (*(names[name] for name, _, _ in candidates), *replaced)):
            choice.skipped.append((asked, "no Linear, Conv or attention layer; spell parameters of others to the end"))
    return choice


def _replaced_weights(module: nn.Module) -> list[str]:
    """Return the weights in whose place something else computes another."""
    found = []
    for name, layer in module.named_modules():
        replaced = layer._parameters.keys() & {f"weight_{end}" for end in REPLACEMENTS}
        if isinstance(layer, _SINGLE_WEIGHT) and (replaced or is_parametrized(layer, "weight")):
            found.append(clean_name(f"{name}.weight"))
    return found


def _check_names(wanted: Wanted, names: Sequence[str]) -> None:
    for argument, asked in (("include", wanted.include), ("exclude", wanted.exclude), ("pattern", wanted.patterns)):
        named = [pattern for pattern in asked or [] if argument != "pattern" or pattern != "*"]
        check_patterns(named, names, f"{wanted.label}({argument}=...)")


def _parameter(owner: Owner) -> nn.Parameter:
    parameter = owner[1]._parameters[owner[2]]
    assert parameter is not None
    return parameter


def _take(
    choice: Choice,
    candidate: Owner,
    names: Sequence[str],
    uses: Sequence[tuple[nn.Module, str]],
    wanted: Wanted,
    is_end: bool,
) -> None:
    """Sort one candidate into the choice.

    Args:
        choice: What is chosen so far.
        candidate: Name, module and attribute of the parameter.
        names: All its names.
        uses: All modules that own it, each with its attribute.
        wanted: What the user asked for.
        is_end: Whether it is the first or the last layer.
    """
    name, owner, attribute = candidate
    parameter, key = _parameter(candidate), first_match(names, wanted.patterns)
    dim = _group_dim(owner, attribute, wanted.axis, is_spelled(names, wanted.include or []))
    reason = _why_not(parameter, key, dim, wanted, names, [n for n in names if n != clean_name(name) and len(uses) > 1])
    if is_end and not reason:
        reason = "the first and the last layer stay dense unless include names them"
    if reason:
        choice.skipped.append((clean_name(name), reason))
        return
    assert key is not None
    assert dim is not None
    _refuse_two_patterns(names, wanted, key)
    if not any(weight.parameter is parameter for weight in choice.chosen):
        twins = [use for use in uses if use != (owner, attribute)]
        in_place = bool(twins) or not _is_known(owner, attribute)
        choice.chosen.append(SparseWeight(name, owner, attribute, wanted.patterns[key], dim, in_place, twins))


def _refuse_two_patterns(names: Sequence[str], wanted: Wanted, key: str) -> None:
    """Raise if two keys name a tied parameter, each under another of its names, and want different patterns."""
    patterns, covered = wanted.patterns, [name for name in names if matches(name, [key])]
    for other in patterns:
        own = [name for name in names if matches(name, [other])]
        if own and not set(own) & set(covered) and patterns[other] != patterns[key]:
            raise ValueError(
                f"{wanted.label}: {covered[0]} and {own[0]} are one tied parameter, and pattern gives them "
                f"{patterns[key]} and {patterns[other]}. Give both the same pattern."
            )


def _is_known(owner: nn.Module, attribute: str) -> bool:
    if isinstance(owner, nn.MultiheadAttention):
        return attribute in _ATTENTION_WEIGHTS
    return isinstance(owner, _SINGLE_WEIGHT) and attribute == "weight"


def _is_candidate(candidate: Owner, names: Sequence[str], include: Sequence[str] | None) -> bool:
    """Return whether a parameter may be chosen.

    Layers of torch are known by their type, other linear layers by a matrix named ``weight``, and parameters of other modules
    only where a pattern spells their own name.
    """
    _, owner, attribute = candidate
    if _is_known(owner, attribute) or (attribute == "weight" and is_foreign_matrix(owner, attribute)):
        return include is None or matches(names, include)
    return is_spelled(names, include or [])


def _group_dim(owner: nn.Module, attribute: str, axis: Axis, spelled: bool) -> int | None:
    """Return the dimension in which groups lie; ``None`` if the layer does not show where its inputs are."""
    parameter = owner._parameters[attribute]
    assert parameter is not None
    if isinstance(parameter, UninitializedParameter) or parameter.ndim < 2:
        return 0  # it is not chosen
    if not isinstance(axis, str):
        return group_dim(parameter, axis)
    outputs = output_dimension(owner, attribute)
    if outputs is None and not spelled:
        return None
    return {"input": 0, "output": 1}[axis] if outputs == 1 else group_dim(parameter, axis)


def _find_ends(
    owners: Sequence[Owner],
    candidates: Sequence[Owner],
    names: Mapping[str, Sequence[str]],
    wanted: Wanted,
    ends: Ends,
) -> set[str]:
    able = [c for c in candidates if _parameter(c).requires_grad and not wanted.excludes(names[c[0]])]
    able_names = {name for name, _, _ in able}
    left_out = {name for name, _, _ in candidates} - able_names
    layers = [owner for owner in owners if owner[0] in able_names or (_is_layer(owner) and owner[0] not in left_out)]
    return ends.find(able, layers)


def _is_layer(owner: Owner) -> bool:
    """Return whether a parameter is the weight of a single layer, and not a table of a whole network."""
    parameter = _parameter(owner)
    if isinstance(parameter, UninitializedParameter):
        return False
    return parameter.ndim >= 2 and next(owner[1].children(), None) is None


def _why_not(
    parameter: nn.Parameter,
    key: str | None,
    dim: int | None,
    wanted: Wanted,
    names: Sequence[str],
    tied_to: Sequence[str],
) -> str:
    by_default = wanted.include is None
    if wanted.excludes(names):
        return "excluded"
    if key is None:
        return "no pattern is given for it"
    if isinstance(parameter, UninitializedParameter):
        return "it has no shape yet (a lazy module): run one batch through it before the fit"
    if parameter.ndim < 2 or not parameter.is_floating_point():
        return "only floating weights of two or more dimensions have groups"
    if by_default and not parameter.requires_grad:
        return f"{_FROZEN}; include it by name to make it sparse all the same"
    if dim is None:
        return "its layer computes neither x W nor x W^T; spell its name in include= to take dimension 1 for the inputs"
    if by_default and tied_to:
        return f"tied to {', '.join(tied_to)}; include it by name to mask every use"
    pattern, size = wanted.patterns[key], parameter.shape[dim]
    return "" if pattern.fits(size) else f"groups of {pattern.m} do not divide {size}"


def is_shown(weight: SparseWeight) -> bool:
    """Return whether a technique already shows this parameter through a view."""
    return has_view(weight.module, weight.attribute)


def refuse_overlap(weight: SparseWeight, technique: str) -> None:
    """Raise if another technique already shows this parameter through a view.

    Raises:
        ValueError: With the name of the parameter.
    """
    if is_shown(weight):
        raise ValueError(
            f"{technique} and another instance both choose {clean_name(weight.name)} "
            f"({viewed_class(weight.module).__name__}). Separate them with include= or exclude=."
        )


def refuse_pruners(callbacks: Iterable[object], weights: Sequence[SparseWeight], technique: str) -> None:
    """Raise if another callback, such as Lightning's ``ModelPruning``, is to prune one of the weights.

    Args:
        callbacks: All of the trainer, set up.
        weights: The weights that are made sparse.
        technique: Who makes them sparse.

    Raises:
        ValueError: With the names of both and of the first weight.
    """
    chosen = {id(weight.parameter): clean_name(weight.name) for weight in weights}
    for callback in callbacks:
        for pair in getattr(callback, "_parameters_to_prune", None) or []:
            module, attribute = pair
            name = chosen.get(id(module._parameters.get(attribute)))
            if name is not None:
                kind = type(callback).__name__
                raise ValueError(
                    f"{technique} and {kind} would both prune {name}. Keep one of them, or separate them: "
                    f"exclude=[{name!r}] for {technique}, or {kind}(parameters_to_prune=[...]) with other layers."
                )
