"""One sparse weight: its mask now, what the forward pass sees of it, and which weights of a module are chosen.

Used by :class:`lightning_grad.callbacks.NMSparsity` alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lightning_grad.functional import NMPattern, NMPhase, nm_mask, prune, scale_weight
from lightning_grad.functional.nm_schedule import DENSE
from lightning_grad.functional.nm_sparsity import Axis, group_dim
from lightning_grad.utilities.parameters import check_patterns, clean_name, matches, named_owners, shared_names
from lightning_grad.utilities.portable import pack_bits, unpack_bits
from lightning_grad.utilities.reporting import format_table
from lightning_grad.utilities.weight_view import InPlaceView, has_view, viewed_class

_SINGLE_WEIGHT = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_MOST_SHOWN = 24
_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class SparseWeight:
    """A dense parameter and its N:M mask; the view through which the module sees it.

    Args:
        name: Full name of the parameter, as in ``state_dict``.
        module: The module that owns it.
        attribute: Its name there.
        pattern: The pattern it ends with.
        dim: Dimension in which the groups lie.
        in_place: Whether the module is shown the weight by writing it into the parameter.
        others: Other owners of the same, tied parameter, each with its attribute.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        attribute: str,
        pattern: NMPattern,
        dim: int,
        in_place: bool = False,
        others: Sequence[tuple[nn.Module, str]] = (),
    ) -> None:
        self.name = name
        self.module = module
        self.attribute = attribute
        self.pattern = pattern
        self.dim = dim
        self.in_place = in_place
        self.others = others
        self.exposed: InPlaceView | None = None
        self.straight_through = False
        self.phase: NMPhase = DENSE
        self.factor: Tensor | None = None
        self.inference: Tensor | None = None
        self._mask_age = 0
        self._version = -1

    @property
    def parameter(self) -> nn.Parameter:
        """The dense weight."""
        return self.module._parameters[self.attribute]  # type: ignore[return-value]

    @property
    def dense(self) -> Tensor:
        """The dense weight's values, also while a step computes with others in its place."""
        return self.parameter.detach() if self.exposed is None else self.exposed.dense

    @property
    def size(self) -> int:
        """Size of the dimension in which the groups lie."""
        return self.parameter.shape[self.dim]

    @property
    def mask(self) -> Tensor | None:
        """The mask in use, in the weight's dtype; ``None`` while no weight is outside of one."""
        if self.factor is None or self.phase.decay == 0.0:
            return self.factor
        return None if self.phase.decay >= 1.0 else (self.factor == 1.0).to(self.factor.dtype)

    def value(self, dense: Tensor) -> Tensor:
        """Return what the forward pass uses."""
        if self.inference is not None:
            return self.inference
        if self.factor is None:
            return dense
        return scale_weight(dense, self.factor, self.straight_through)

    def stored(self, dense: Tensor) -> Tensor:
        """Return what inference and checkpoints use: always under the mask of these very values.

        The mask that trains may be some steps old (``mask_every``), and weight averaging brings other weights; this is
        right for both.
        """
        return dense if self.phase.pattern is None else prune(dense, self._factor_of(dense))

    def _factor_of(self, dense: Tensor) -> Tensor:
        assert self.phase.pattern is not None
        mask = nm_mask(dense, self.phase.pattern.n, self.phase.pattern.m, self.dim)
        return mask.clamp_(min=self.phase.decay) if self.phase.decay > 0.0 else mask

    def refresh(self, phase: NMPhase, mask_every: int = 1) -> None:
        """Take the mask anew from the dense weight, or only the decay value while the mask is young enough."""
        mask = self.mask if phase.pattern == self.phase.pattern and self._mask_age + 1 < mask_every else None
        self.phase = phase
        self._mask_age = 0 if mask is None else self._mask_age + 1
        self._version = self.parameter._version
        if phase.pattern is None:
            self.factor = None
        elif mask is None:
            self.factor = self._factor_of(self.dense)
        else:
            self.factor = mask.clamp(min=phase.decay)

    def refresh_if_changed(self) -> None:
        """Take the mask anew if something other than the optimizer (a load) has changed the weight."""
        if self.parameter._version != self._version:
            self.refresh(self.phase)

    def enter_inference(self) -> None:
        """Show what a checkpoint would hold, whichever weights are in the parameter now."""
        self.inference = None if self.phase.pattern is None else self.stored(self.dense)

    def leave_inference(self) -> None:
        """Show the training weights again."""
        self.inference = None

    @torch.no_grad()
    def bake(self) -> None:
        """Make the stored weight the parameter's own."""
        self.parameter.copy_(self.stored(self.parameter.detach()))

    def state_dict(self) -> dict[str, Any]:
        """Return what a mask that is older than its weight needs to go on."""
        mask = self.mask
        return {"age": self._mask_age, "mask": pack_bits(mask)} if self._mask_age and mask is not None else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with a saved mask, after :meth:`refresh`."""
        if state and self.factor is not None:
            mask = unpack_bits(state["mask"], self.factor).to(self.factor.dtype)
            self.factor, self._mask_age = mask.clamp_(min=self.phase.decay), int(state["age"])


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
        return f"makes {len(self.chosen)} weight{'s' * (len(self.chosen) > 1)} sparse:\n{table}{more}"

    def why_none(self) -> str:
        """Say why nothing was chosen, and what to do."""
        reasons = [f"{name}: {reason}" for name, reason in self.skipped[:8]]
        if not reasons:
            return (
                "No Linear, Conv or attention layer is meant; parameters of other modules are included by their full "
                "name, such as include=['blocks.*.w1']."
            )
        return f"{'; '.join(reasons)}. Choose other layers with include=, or another pattern."


def choose_weights(
    module: nn.Module,
    patterns: Mapping[str, NMPattern],
    axis: Axis,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
) -> Choice:
    """Find the weights to make sparse.

    Args:
        module: The LightningModule, complete.
        patterns: N:M pattern by name pattern; the first that matches counts.
        axis: Along which dimension the groups lie.
        include: Name patterns; ``None`` means every Linear, Conv and attention weight but the first and the last.
        exclude: Name patterns of what stays dense.

    Raises:
        ValueError: If a name pattern matches nothing, or the names of a tied parameter are given different patterns.
    """
    owners = list(named_owners(module))
    names = [name for name, _, _ in owners]
    for argument, asked in (("include", include), ("exclude", exclude), ("pattern", [p for p in patterns if p != "*"])):
        check_patterns(asked or [], names, argument)
    candidates = [owner for owner in owners if _is_candidate(*owner, include)]
    ends = _ends(candidates, exclude) if include is None else set()
    tied = shared_names(module)
    choice = Choice([], [])
    for name, owner, attribute in candidates:
        parameter = owner._parameters[attribute]
        assert parameter is not None
        others = [clean_name(other) for other in tied.get(id(parameter), []) if other != name]
        pattern = next((p for key, p in patterns.items() if matches(name, [key])), None)
        reason = _why_not(name, parameter, pattern, axis, include, exclude, others)
        if name in ends and not reason:
            reason = "the first and the last layer stay dense unless include names them"
        if reason:
            choice.skipped.append((clean_name(name), reason))
            continue
        assert pattern is not None
        twin = next((weight for weight in choice.chosen if weight.parameter is parameter), None)
        if twin is None:
            twins = [
                (other, key) for twin, other, key in owners if other._parameters[key] is parameter and twin != name
            ]
            in_place = bool(twins) or not _is_known(owner, attribute)
            weight = SparseWeight(name, owner, attribute, pattern, group_dim(parameter, axis), in_place, twins)
            choice.chosen.append(weight)
        elif twin.pattern != pattern:
            raise ValueError(
                f"{clean_name(name)} and {clean_name(twin.name)} are one tied parameter, and are given {pattern} and "
                f"{twin.pattern}. Give both the same pattern."
            )
    found = [name for name, _, _ in candidates]
    for asked in include or []:
        if not any(matches(name, [asked]) for name in found):
            choice.skipped.append((asked, "no Linear, Conv or attention layer; spell parameters of others to the end"))
    return choice


def _is_known(owner: nn.Module, attribute: str) -> bool:
    if isinstance(owner, nn.MultiheadAttention):
        return attribute in _ATTENTION_WEIGHTS
    return isinstance(owner, _SINGLE_WEIGHT) and attribute == "weight"


def _is_candidate(name: str, owner: nn.Module, attribute: str, include: Sequence[str] | None) -> bool:
    """Known layers are found by type; parameters of other modules only where a pattern spells their own name."""
    if _is_known(owner, attribute):
        return include is None or matches(name, include)
    return matches(name, [pattern for pattern in include or [] if _spells(pattern, attribute)])


def _spells(pattern: str, attribute: str) -> bool:
    last = pattern.rpartition(".")[2]
    return last != "*" and fnmatchcase(attribute, last)


def _ends(candidates: Sequence[tuple[str, nn.Module, str]], exclude: Sequence[str] | None) -> set[str]:
    """Return the names of the first and the last layer, of those that train."""
    training = [
        name
        for name, owner, attribute in candidates
        if owner._parameters[attribute].requires_grad and not matches(name, exclude or [])  # type: ignore[union-attr]
    ]
    return {training[0], training[-1]} if training else set()


def _why_not(
    name: str,
    parameter: nn.Parameter,
    pattern: NMPattern | None,
    axis: Axis,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    tied_to: Sequence[str],
) -> str:
    if exclude and matches(name, exclude):
        return "excluded"
    if pattern is None:
        return "no pattern is given for it"
    if isinstance(parameter, UninitializedParameter):
        return "it has no shape yet (a lazy module): run one batch through it before the fit"
    if parameter.ndim < 2 or not parameter.is_floating_point():
        return "only floating weights of two or more dimensions have groups"
    if include is None and not parameter.requires_grad:
        return "frozen"
    if include is None and tied_to:
        return f"tied to {', '.join(tied_to)}; include it by name to mask every use"
    size = parameter.shape[group_dim(parameter, axis)]
    return "" if pattern.fits(size) else f"groups of {pattern.m} do not divide {size}"


def refuse_overlap(weight: SparseWeight, technique: str) -> None:
    """Raise if another technique already shows this parameter through a view.

    Raises:
        ValueError: With the name of the parameter.
    """
    if has_view(weight.module, weight.attribute):
        raise ValueError(
            f"{technique} and another instance both choose {clean_name(weight.name)} "
            f"({viewed_class(weight.module).__name__}). Separate them with include= or exclude=."
        )
