"""Which gradients make a layer, for rules that act on each layer and for what watches them."""

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
        index: (gradients,): number of the layer of each gradient.
        sizes: (layers,): number of entries of each layer.
    """

    names: tuple[str, ...]
    index: Tensor
    sizes: Tensor


class LayerFinder:
    """Sorts gradients into layers, once for each set of parameters that have one.

    Args:
        per: A layer is a module's own parameters together, or each parameter for itself.
        layer_depth: Join layers whose names agree in so many leading parts; ``None`` joins none.
    """

    def __init__(self, per: Per = "module", layer_depth: int | None = None) -> None:
        self._per = per
        self._layer_depth = layer_depth
        self._known: dict[tuple[str, ...], Layers] = {}

    def find(self, names: Sequence[str], gradients: Sequence[Tensor]) -> Layers:
        """Return the layers of gradients, by the names of their parameters."""
        known = tuple(names)
        if len(self._known) > _MOST_KNOWN:  # random subsets of experts have no end
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
