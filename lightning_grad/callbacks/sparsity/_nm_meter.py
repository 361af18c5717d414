"""Measurements of sparse weights during training: density, mask flips, gradient variance.

Used only by :class:`lightning_grad.callbacks.NMSparsity`. All values stay tensors until a log step needs numbers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_grad.callbacks.sparsity._nm_weight import SparseWeight
from lightning_grad.core.views.portable import pack_bits, unpack_bits
from lightning_grad.functional import mask_distance, masked_gradient_variance
from lightning_grad.functional.gradients.shards import shard_of
from lightning_grad.functional.gradients.tensor_lists import is_sharded, whole


def sparsity_totals(weights: Sequence[SparseWeight]) -> dict[str, float]:
    """Return density and decay value over all weights, and whether all have their final pattern."""
    total = sum(w.parameter.numel() for w in weights)
    return {
        "density": sum(w.parameter.numel() * w.density for w in weights) / total,
        "decay": sum(w.parameter.numel() * w.phase.decay for w in weights) / total,
        "exact": float(all(w.phase.final for w in weights)),
    }


def current_patterns(weights: Sequence[SparseWeight]) -> dict[str, float]:
    """Return the current N and M (1 and 1 while dense), for each final pattern if there are several."""
    current = {str(w.pattern): w.phase.pattern for w in weights}
    values = {}
    for target, pattern in current.items():
        suffix = f"/{target}" if len(current) > 1 else ""
        values[f"n{suffix}"] = float(pattern.n if pattern else 1)
        values[f"m{suffix}"] = float(pattern.m if pattern else 1)
    return values


def phase_name(weights: Sequence[SparseWeight]) -> str:
    """Return a name that changes with the current pattern and with the kind of pruning."""
    phases = dict.fromkeys((w.phase.pattern, w.phase.decay > 0.0) for w in weights)
    names = [f"{pattern} decaying" if pattern and decaying else str(pattern or "dense") for pattern, decaying in phases]
    return " and ".join(names)


class SparsityMeter:
    """Compares the masks of two log steps, and the gradients of a log step with the gradients of the step before."""

    def __init__(self) -> None:
        self._logged_masks: dict[str, Tensor] = {}  # as _stored returns them
        self._previous: dict[str, Tensor] = {}
        self._variances: list[tuple[Tensor, Tensor, SparseWeight]] = []

    def add_gradient(self, weight: SparseWeight, gradient: Tensor, measure: bool, keep: bool) -> None:
        """Compare a gradient with the previous one, or keep it for that.

        Args:
            weight: Weight of the gradient.
            gradient: Gradient from the loss.
            measure: Whether this step is logged.
            keep: Whether the next step is logged.
        """
        previous, mask = self._previous.pop(weight.name, None), weight.mask
        if measure and previous is not None and mask is not None:
            pruned, kept = map(whole, masked_gradient_variance(gradient, previous, mask))
            self._variances.append((pruned, kept, weight))
        if keep:
            self._previous[weight.name] = gradient.clone()

    def forget_step(self) -> None:
        """Drop the measurements of the last step."""
        self._variances = []

    def read(self, weights: Sequence[SparseWeight]) -> dict[str, Tensor]:
        """Return the available measurements of this log step as scalar tensors."""
        return {**self._flips(weights), **self._mean_variance()}

    def _flips(self, weights: Sequence[SparseWeight]) -> dict[str, Tensor]:
        flips, entries = [], 0
        for weight in weights:
            mask, before = weight.mask, self._logged_masks.pop(weight.name, None)
            if mask is None:
                continue
            kept = mask != 0
            self._logged_masks[weight.name] = _stored(kept)
            if before is not None:
                flips.append(whole(mask_distance(kept, _restored(before, kept))) * mask.numel())
                entries += mask.numel()
        return {"flips": torch.stack(flips).sum() / entries} if flips else {}

    def _mean_variance(self) -> dict[str, Tensor]:
        pruned = [(variance, w.parameter.numel() * (1 - w.share_in_mask)) for variance, _, w in self._variances]
        kept = [(variance, w.parameter.numel() * w.share_in_mask) for _, variance, w in self._variances]
        return {**_mean("gradient_variance_pruned", pruned), **_mean("gradient_variance_kept", kept)}

    def state_dict(self) -> dict[str, Any]:
        """Return the masks of the last log step, packed, and the gradients that the next step is compared with."""
        masks = {name: mask if _is_packed(mask) else pack_bits(mask) for name, mask in self._logged_masks.items()}
        return {"logged_masks": masks, "previous_gradients": {name: whole(g) for name, g in self._previous.items()}}

    def load_state_dict(self, state: Mapping[str, Any], weights: Sequence[SparseWeight]) -> None:
        """Continue with the masks and gradients of a saved step."""
        masks, gradients = state.get("logged_masks", {}), state.get("previous_gradients", {})
        for weight in weights:
            if weight.name in masks:
                self._logged_masks[weight.name] = _stored(unpack_bits(masks[weight.name], weight.parameter))
            if weight.name in gradients:
                self._previous[weight.name] = shard_of(
                    gradients[weight.name].to(weight.parameter.device), weight.parameter
                )


def _stored(mask: Tensor) -> Tensor:
    """Return a bool mask in the form that is kept until the next log step: bits on a CPU; packing would make a GPU wait."""
    return pack_bits(mask) if mask.is_cpu and not is_sharded(mask) else mask


def _restored(stored: Tensor, like: Tensor) -> Tensor:
    return unpack_bits(stored, like) if _is_packed(stored) else stored


def _is_packed(stored: Tensor) -> bool:
    return stored.dtype == torch.uint8


def _mean(name: str, parts: Sequence[tuple[Tensor, float]]) -> dict[str, Tensor]:
    total = sum(count for _, count in parts)
    return {name: torch.stack([value * (count / total) for value, count in parts if count]).sum()} if total else {}
