"""Which weights of a module are made sparse, and why others are not.

Used by :class:`lightning_grad.callbacks.NMSparsity` alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import UninitializedParameter

from lightning_grad.callbacks._nm_ends import Ends, Owner
from lightning_grad.callbacks._nm_weight import SparseWeight
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
from lightning_grad.utilities.reporting import format_table
from lightning_grad.utilities.weight_axes import is_foreign_matrix, output_dimension
from lightning_grad.utilities.weight_view import has_view, viewed_class

_SINGLE_WEIGHT = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_MOST_SHOWN = 24
_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_FROZEN = "frozen"


@dataclass(frozen=True)
class Choice:
    """Which weights of a module are made sparse, and why others are not."""

    chosen: list[SparseWeight]
    skipped: list[tuple[str, str]]

    def __str__(self) -> str:
        rows = [[clean_name(w.name), "x".join(map(str, w.parameter.shape)), str(w.pattern)] for w in self.chosen]
        rows += [[name, "dense", reason] for name, reason in self.skipped]
        more = f"\n... and {len(rows) - _MOST_SHOWN} more" if len(rows) > _MOST_SHOWN else ""
        table = format_table(rows[:_MOST_SHOWN], ["weight", "shape", "pattern"])
        count = f"{len(self.chosen)} weight{'s' * (len(self.chosen) > 1)}"
        if all(weight.pattern.n == weight.pattern.m for weight in self.chosen):
            return f"keeps {count} dense, because N = M prunes nothing:\n{table}{more}"
        return f"makes {count} sparse:\n{table}{more}"

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
            advice = f"Name frozen layers to choose them all the same, such as include={frozen[:1]!r}: they become sparse too"
            return f"{'; '.join(reasons)}. {advice}, also where a callback unfreezes them later."
        return f"{'; '.join(reasons)}. Choose other layers with include=, or another pattern."


def choose_weights(
    module: nn.Module,
    patterns: Mapping[str, NMPattern],
    axis: Axis,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    ends: Ends,
) -> Choice:
    """Find the weights to make sparse.

    Args:
        module: The LightningModule, complete.
        patterns: N:M pattern by name pattern; the first that matches counts.
        axis: Along which dimension the groups lie.
        include: Name patterns; ``None`` means every Linear, Conv and attention weight, and other matrices that their layer
            multiplies by, but the first and the last.
        exclude: Name patterns of what stays dense.
        ends: Finds the first and the last.

    Raises:
        ValueError: If a name pattern matches nothing, or the names of a tied parameter are given different patterns.
    """
    owners, known = list(named_owners(module)), all_names(module)
    names = parameter_names(module)
    for argument, asked in (("include", include), ("exclude", exclude), ("pattern", [p for p in patterns if p != "*"])):
        check_patterns(asked or [], names, argument)
    candidates = [owner for owner in owners if _is_candidate(owner[1], owner[2], known[id(_parameter(owner))], include)]
    dense = _find_ends(owners, candidates, known, exclude, ends) if include is None else set()
    choice = Choice([], [])
    for candidate in candidates:
        _take(choice, candidate, owners, known[id(_parameter(candidate))], patterns, axis, include, exclude, dense)
    for asked in include or []:
        if not any(matches(known[id(_parameter(candidate))], [asked]) for candidate in candidates):
            choice.skipped.append((asked, "no Linear, Conv or attention layer; spell parameters of others to the end"))
    return choice


def _parameter(owner: Owner) -> nn.Parameter:
    parameter = owner[1]._parameters[owner[2]]
    assert parameter is not None
    return parameter


def _take(
    choice: Choice,
    candidate: Owner,
    owners: Sequence[Owner],
    names: Sequence[str],
    patterns: Mapping[str, NMPattern],
    axis: Axis,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    dense: set[str],
) -> None:
    """Sort one candidate into the choice."""
    name, owner, attribute = candidate
    parameter = _parameter(candidate)
    twins = [(other, key) for _, other, key in owners if other._parameters[key] is parameter]
    key = first_match(names, patterns)
    dim = _group_dim(owner, attribute, axis, is_spelled(names, include or []))
    others = [other for other in names if other != clean_name(name)] if len(twins) > 1 else []
    reason = _why_not(
        parameter, None if key is None else patterns[key], dim, include, matches(names, exclude or []), others
    )
    if clean_name(name) in dense and not reason:
        reason = "the first and the last layer stay dense unless include names them"
    if reason:
        choice.skipped.append((clean_name(name), reason))
        return
    assert key is not None
    assert dim is not None
    _refuse_two_patterns(names, patterns, key)
    if not any(weight.parameter is parameter for weight in choice.chosen):
        uses = [twin for twin in twins if twin != (owner, attribute)]
        in_place = bool(uses) or not _is_known(owner, attribute)
        choice.chosen.append(SparseWeight(name, owner, attribute, patterns[key], dim, in_place, uses))


def _refuse_two_patterns(names: Sequence[str], patterns: Mapping[str, NMPattern], key: str) -> None:
    """Raise if two keys name a tied parameter, each under another of its names, and want different patterns."""
    covered = [name for name in names if matches(name, [key])]
    for other in patterns:
        own = [name for name in names if matches(name, [other])]
        if own and not set(own) & set(covered) and patterns[other] != patterns[key]:
            raise ValueError(
                f"{covered[0]} and {own[0]} are one tied parameter, and are given {patterns[key]} and {patterns[other]}. Give "
                "both the same pattern."
            )


def _is_known(owner: nn.Module, attribute: str) -> bool:
    if isinstance(owner, nn.MultiheadAttention):
        return attribute in _ATTENTION_WEIGHTS
    return isinstance(owner, _SINGLE_WEIGHT) and attribute == "weight"


def _is_candidate(owner: nn.Module, attribute: str, names: Sequence[str], include: Sequence[str] | None) -> bool:
    """Return whether a parameter may be chosen.

    Layers of torch are known by their type, other linear layers by a matrix named ``weight``, and parameters of other modules
    only where a pattern spells their own name.
    """
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
    known: Mapping[int, list[str]],
    exclude: Sequence[str] | None,
    ends: Ends,
) -> set[str]:
    able = [
        candidate
        for candidate in candidates
        if _parameter(candidate).requires_grad and not matches(known[id(_parameter(candidate))], exclude or [])
    ]
    left_out = {name for name, _, _ in candidates} - {name for name, _, _ in able}
    layers = [owner for owner in owners if owner in able or (_is_layer(owner) and owner[0] not in left_out)]
    return ends.find(able, layers)


def _is_layer(owner: Owner) -> bool:
    """Return whether a parameter is the weight of a single layer, and not a table of a whole network."""
    parameter = _parameter(owner)
    if isinstance(parameter, UninitializedParameter):
        return False
    return parameter.ndim >= 2 and next(owner[1].children(), None) is None


def _why_not(
    parameter: nn.Parameter,
    pattern: NMPattern | None,
    dim: int | None,
    include: Sequence[str] | None,
    excluded: bool,
    tied_to: Sequence[str],
) -> str:
    if excluded:
        return "excluded"
    if pattern is None:
        return "no pattern is given for it"
    if isinstance(parameter, UninitializedParameter):
        return "it has no shape yet (a lazy module): run one batch through it before the fit"
    if parameter.ndim < 2 or not parameter.is_floating_point():
        return "only floating weights of two or more dimensions have groups"
    if include is None and not parameter.requires_grad:
        return f"{_FROZEN}; include it by name to make it sparse all the same"
    if dim is None:
        return "its layer computes neither x W nor x W^T; spell its name in include= to take dimension 1 for the inputs"
    if include is None and tied_to:
        return f"tied to {', '.join(tied_to)}; include it by name to mask every use"
    size = parameter.shape[dim]
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
