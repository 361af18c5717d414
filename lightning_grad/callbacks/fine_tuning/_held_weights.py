"""Entries of weights that train, and the bits of all others."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_grad.core.views.portable import unpack_bits
from lightning_grad.functional.plain_tensors import plain_tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


class HeldWeights:
    """Parameters of which only some entries train.

    Args:
        masks: Where each parameter trains, as packed bits.
        parameters: These parameters; their other entries keep the values that they have now.

    Attributes:
        share: Share of the entries that train.
    """

    def __init__(self, masks: list[Tensor], parameters: list[Tensor]) -> None:
        self._held: dict[int, tuple[Tensor, Tensor]] = {}  # where it trains, and its bits, which are 0 there
        for packed, parameter in zip(masks, parameters, strict=True):
            mask = unpack_bits(packed, parameter)
            self._held[id(parameter)] = mask, as_bits(parameter) * ~mask
        trained = sum(int(mask.sum()) for mask, _ in self._held.values())
        self.share = trained / max(1, sum(mask.numel() for mask, _ in self._held.values()))

    @property
    def masks(self) -> Mapping[int, Tensor]:
        """Where each parameter trains, by ``id()``."""
        return {key: mask for key, (mask, _) in self._held.items()}

    def mask_gradients(self, optimizer: Optimizer) -> None:
        """Set the gradients of all entries that do not train to 0."""
        for parameter, mask, _ in self._of(optimizer):
            if parameter.grad is not None:
                as_bits(parameter.grad).mul_(mask)

    def restore(self, optimizer: Optimizer) -> None:
        """Give all entries that do not train their values back."""
        for parameter, mask, kept in self._of(optimizer):
            as_bits(parameter).mul_(mask).add_(kept)

    def _of(self, optimizer: Optimizer) -> list[tuple[Tensor, Tensor, Tensor]]:
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        return [(p, *self._held[id(p)]) for p in weights if id(p) in self._held]


def as_bits(tensor: Tensor) -> Tensor:
    """Return the bits of a tensor as integers that share its memory.

    Products and sums of integers are exact, also for NaN, and many times faster on a CPU than ``masked_fill_``.
    """
    return plain_tensor(tensor).detach().view(_INTEGERS[tensor.element_size()])
