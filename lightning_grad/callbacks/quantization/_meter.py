"""Measurements of quantized weights at log steps, and batch norms that use their running statistics.

Used only by :class:`lightning_grad.callbacks.QuantizationAwareTraining`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_grad.callbacks.quantization._grid_weight import GridWeight
from lightning_grad.functional.gradients.shards import sum_over_shards
from lightning_grad.functional.gradients.tensor_lists import whole


class LevelFlips:
    """Counts the weights whose level an optimizer step changes."""

    def __init__(self) -> None:
        self._before: dict[int, Tensor] = {}
        self._counts: list[tuple[Tensor, int]] = []

    def remember(self, weights: Sequence[GridWeight]) -> None:
        """Keep the levels of weights before a step."""
        self._before |= {id(weight): weight.levels for weight in weights}

    def count(self, weights: Sequence[GridWeight]) -> None:
        """Compare the levels of weights with those before the step."""
        for weight in weights:
            before = self._before.pop(id(weight), None)
            if before is not None:
                changed = sum_over_shards((weight.levels != before).sum(), weight.parameter)
                self._counts.append((changed, weight.parameter.numel()))

    def share(self) -> Tensor | None:
        """Return the share of the weights that changed their level; ``None`` if no weight was compared."""
        total = sum(entries for _, entries in self._counts)
        return torch.stack([count for count, _ in self._counts]).sum() / total if total else None

    def clear(self) -> None:
        """Drop what this step left."""
        self._before.clear()
        self._counts.clear()


@torch.no_grad()
def relative_error(weights: Sequence[GridWeight]) -> Tensor:
    """Return the root mean square of all rounding errors, relative to that of the weights."""
    errors, sizes = zip(*(weight.squared_error() for weight in weights), strict=True)
    return (torch.stack(errors).sum() / torch.stack(sizes).sum()).sqrt()


def free_share(weights: Sequence[GridWeight], width: float) -> Tensor:
    """Return the share of the weights that lie near a boundary between two levels."""
    near = torch.stack([whole(weight.near_boundary(width).sum()) for weight in weights]).sum()
    return near / sum(weight.parameter.numel() for weight in weights)


class FrozenNorms:
    """Batch norms that normalize with their running statistics, in training too."""

    def __init__(self) -> None:
        self._frozen: list[nn.Module] = []

    def freeze(self, module: nn.Module) -> None:
        """Put the batch norms of a module into eval mode. Call it in every batch, because other code may undo it."""
        for norm in module.modules():
            if isinstance(norm, _BatchNorm) and norm.training and norm.track_running_stats:
                norm.eval()
                if not any(norm is each for each in self._frozen):
                    self._frozen.append(norm)

    def thaw(self) -> None:
        """Put them back into training mode."""
        for norm in self._frozen:
            norm.train()
