"""What the two layer-wise rules share: which gradients make a layer.

Used by ``layerwise_clipping.py`` and ``layerwise_normalization.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_grad.callbacks.conditioner import GradientStep

Per = Literal["module", "parameter"]


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
    """

    def __init__(self, per: Per) -> None:
        self._per = per
        self._known: dict[tuple[str, ...], Layers] = {}

    def find(self, step: GradientStep) -> Layers:
        """Return the layers of a step's gradients."""
        names = tuple(step.names)
        if names not in self._known:
            self._known[names] = self._sort(names, step.gradients)
        return self._known[names]

    def _sort(self, names: Sequence[str], gradients: Sequence[Tensor]) -> Layers:
        owners = [name.rpartition(".")[0] or name if self._per == "module" else name for name in names]
        numbers = {owner: number for number, owner in enumerate(dict.fromkeys(owners))}
        sizes = [0.0] * len(numbers)
        for owner, gradient in zip(owners, gradients, strict=True):
            sizes[numbers[owner]] += gradient.numel()
        device = gradients[0].device
        index = torch.tensor([numbers[owner] for owner in owners], device=device)
        return Layers(tuple(numbers), index, torch.tensor(sizes, device=device))
