"""A sparse weight: its current mask, and the value that the forward pass uses.

Used only by :class:`lightning_grad.callbacks.NMSparsity`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_grad.core import FoundWeight, ViewedWeight
from lightning_grad.core.views.portable import pack_bits, unpack_bits
from lightning_grad.functional import NMPattern, NMPhase, add_sr_ste_, is_nm, nm_mask, prune_weight, scale_weight
from lightning_grad.functional.gradients.shards import as_used
from lightning_grad.functional.sparsity.nm_schedule import DENSE
from lightning_grad.functional.sparsity.nm_sparsity import Axis, group_dim, nm_masks
from lightning_grad.utilities.parameters import clean_name

_SMALL = 1 << 15  # entries of a gradient; for a larger one, a call of its own costs little


class SparseWeight(ViewedWeight):
    """A dense parameter and its N:M mask.

    Args:
        found: The weight.
        pattern: Its final pattern.
        dim: Dimension along which the groups lie.
        straight_through: Whether pruned weights get the gradient unchanged.
    """

    def __init__(self, found: FoundWeight, pattern: NMPattern, dim: int, straight_through: bool) -> None:
        super().__init__(found)
        self.pattern = pattern
        self.dim = dim
        self.size = found.parameter.shape[dim]
        self.straight_through = straight_through
        self.phase: NMPhase = DENSE
        self._factor: Tensor | None = None
        self._mask_age = 0

    @property
    @override
    def makes_zeros(self) -> bool:
        return self.pattern.n < self.pattern.m

    @property
    @override
    def passes_gradient(self) -> bool:
        return self.straight_through

    @property
    def is_pruned(self) -> bool:
        """Whether the current pattern has entries outside the mask."""
        pattern = self.phase.pattern
        return pattern is not None and pattern.n < pattern.m

    @property
    def factor(self) -> Tensor | None:
        """Factor of the weight: 1 in the mask and D outside; ``None`` while nothing is pruned."""
        if self._factor is None and self.is_pruned:
            take_masks([self])
        return self._factor

    @property
    def mask(self) -> Tensor | None:
        """Current mask, in the weight's dtype; ``None`` in a dense phase."""
        factor, decay = self.factor, self.phase.decay
        if factor is None:
            return None if self.phase.pattern is None or decay >= 1.0 else torch.ones_like(self.parameter.detach())
        if decay == 0.0:
            return factor
        return None if decay >= 1.0 else (factor == 1.0).to(factor.dtype)

    @property
    def share_in_mask(self) -> float:
        """Share of entries inside the mask."""
        return self.phase.pattern.density if self.phase.pattern else 1.0

    @property
    def density(self) -> float:
        """Share of entries that are not pruned; 1 while D > 0."""
        return 1.0 if self.phase.decay > 0.0 else self.share_in_mask

    @override
    def value(self, weight: Tensor) -> Tensor:
        factor = self.factor
        if factor is None:
            return weight
        if self.found.sharded is not None and weight is not self.found.sharded:
            # One byte an entry is gathered. The mask is that of the shards: of a weight in bf16, some groups would differ.
            factor = as_used(factor == 1.0, weight).to(weight.dtype).clamp_(min=self.phase.decay)
        return scale_weight(weight, factor, self.straight_through)

    @override
    def stored(self, weight: Tensor) -> Tensor:
        # Compute a fresh mask: the current one may be some steps old (mask_every_n_steps), and weight averaging passes
        # other weights, some of which it copies past the version counter.
        pattern = self.phase.pattern
        if pattern is None or not self.is_pruned:
            return weight
        mask = nm_mask(weight, pattern.n, pattern.m, self.dim)
        return prune_weight(weight, mask.clamp_(min=self.phase.decay) if self.phase.decay > 0.0 else mask)

    def follow(self, phase: NMPhase, mask_every_n_steps: int = 1) -> None:
        """Set the phase, and drop the mask unless it is recent enough; D is always updated."""
        is_recent = self._mask_age + 1 < mask_every_n_steps and phase.pattern == self.phase.pattern and self.is_pruned
        mask = self.mask if is_recent else None
        self.phase = phase
        self._mask_age = 0 if mask is None else self._mask_age + 1
        self._factor = None if mask is None else mask.clamp(min=phase.decay)

    def clear_pruned(self, state: Mapping[str, Any]) -> None:
        """Zero an optimizer's state of pruned entries, once the pattern is final."""
        mask = self.mask if self.phase.final and self.is_pruned else None
        if mask is not None:
            for value in state.values():
                if isinstance(value, Tensor) and value.is_floating_point() and value.shape == self.parameter.shape:
                    value.mul_(mask)

    @property
    @override
    def signature(self) -> list[str | int]:
        return [str(self.pattern), self.dim]

    @override
    def state_dict(self) -> dict[str, Any]:
        # Only a mask that is older than its weight must be saved; others can be recomputed.
        mask = self.mask
        return {"age": self._mask_age, "mask": pack_bits(mask)} if self._mask_age and mask is not None else {}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state and self.is_pruned:
            mask = unpack_bits(state["mask"], self.parameter).to(self.parameter.dtype)
            self._factor, self._mask_age = mask.clamp_(min=self.phase.decay), int(state["age"])

    @override
    def __str__(self) -> str:
        return str(self.pattern)


def take_masks(weights: Sequence[SparseWeight]) -> None:
    """Take the masks that weights lack, with joined calls for all weights of a pattern."""
    due: dict[tuple[int, int, float], list[SparseWeight]] = {}
    for weight in weights:
        pattern = weight.phase.pattern
        if pattern is not None and weight.is_pruned and weight._factor is None:
            due.setdefault((pattern.n, pattern.m, weight.phase.decay), []).append(weight)
    for (n, m, decay), some in due.items():
        factors = nm_masks([w.incoming for w in some], n, m, [w.dim for w in some], decay)
        for weight, factor in zip(some, factors, strict=True):
            weight._factor = factor


@torch.no_grad()
def add_sr_ste(weights: Sequence[SparseWeight], strength: float) -> None:
    """Add the SR-STE term to the gradients of the weights that are pruned, with joined calls for the small ones."""
    joined: dict[tuple[torch.dtype, torch.device], list[tuple[Tensor, Tensor, Tensor]]] = {}
    for weight in weights:
        dense, mask = weight.parameter, None if weight.factor is None else weight.mask
        gradient = dense.grad
        if gradient is None or mask is None:
            continue
        if type(gradient) is Tensor and gradient.numel() <= _SMALL:
            joined.setdefault((mask.dtype, mask.device), []).append((gradient, dense, mask))
        else:
            add_sr_ste_(gradient, dense, mask, strength)
    for some in joined.values():
        gradients, denses, masks = map(list, zip(*some, strict=True))
        outside = 1 - torch._utils._flatten_dense_tensors(masks)  # type: ignore[no-untyped-call]
        parts = torch._utils._unflatten_dense_tensors(outside, masks)  # type: ignore[no-untyped-call]
        torch._foreach_addcmul_(gradients, parts, denses, value=strength)


def dimension_of_groups(found: FoundWeight, axis: Axis) -> int | None:
    """Return the dimension along which groups lie; ``None`` if the layer's input dimension is unknown."""
    if not isinstance(axis, str):
        return group_dim(found.parameter, axis)
    outputs = found.output_dimension()
    if outputs is None and not found.is_spelled:
        return None
    return {"input": 0, "output": 1}[axis] if outputs == 1 else group_dim(found.parameter, axis)


def lacking(module: nn.Module, chosen: Mapping[str, Sequence[str | int]]) -> list[str]:
    """Return the names of a module's weights that lack their pattern, which is given as :attr:`SparseWeight.signature`."""
    present = {clean_name(name): p for name, p in module.named_parameters(remove_duplicate=False)}
    found = []
    for name, (text, dim) in chosen.items():
        weight, pattern = present.get(clean_name(name)), NMPattern.parse(str(text))
        if weight is not None and not is_nm(weight.detach(), pattern.n, pattern.m, int(dim)):
            found.append(clean_name(name))
    return found
