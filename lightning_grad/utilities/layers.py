"""Group gradients into layers, for rules that act on layers and for callbacks that log them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Per = Literal["module", "parameter"]
_MOST_KNOWN = 256


@dataclass(frozen=True)
class Layers:
    """The layers of one set of gradients.

    Args:
        names: Name of each layer.
        index: (gradients,): layer index of each gradient.
        sizes: (layers,): number of entries of each layer.
    """

    names: tuple[str, ...]
    index: Tensor
    sizes: Tensor


class LayerFinder:
    """Group gradients into layers, with a cache for each set of parameters that have gradients.

    Args:
        per: "module" treats the parameters of a module as one layer, "parameter" each as its own layer.
        layer_depth: Merge layers whose names share this many leading parts; ``None`` merges none.
    """

    def __init__(self, per: Per = "module", layer_depth: int | None = None) -> None:
        self._per = per
        self._layer_depth = layer_depth
        self._known: dict[tuple[str, ...], Layers] = {}

    def find(self, names: Sequence[str], gradients: Sequence[Tensor]) -> Layers:
        """Return the layers of gradients, by the names of their parameters."""
        known = tuple(names)
        if len(self._known) > _MOST_KNOWN:  # bounded, because random subsets of experts are endless
            self._known.clear()
        if known not in self._known:
            self._known[known] = self._sort(known, gradients)
        return self._known[known]

    def _owner(self, name: str) -> str:
        owner = name.rpartition(".")[0] or name if self._per == "module" else name
        return owner if self._layer_depth is None else ".".join(owner.split(".")[: self._layer_depth])

    def _sort(self, names: Sequence[str], gradients: Sequence[Tensor]) -> Layers:
        owners = [self._owner(name) for name in names]
        numbers = {owner: number for number, owner in enumerate(dict.fromkeys(owners))}
        sizes = [0.0] * len(numbers)
        for owner, gradient in zip(owners, gradients, strict=True):
            sizes[numbers[owner]] += gradient.numel()
        device = gradients[0].device
        index = torch.tensor([numbers[owner] for owner in owners], device=device)
        return Layers(tuple(numbers), index, torch.tensor(sizes, device=device))
