"""The noise of the gradient, measured on a sample of its entries before they are compressed.

Used by ``compressed_ddp.py``; the estimate is :func:`lightning_grad.functional.noise_scale_terms`.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_grad.functional import noise_scale_terms

_MOST_ENTRIES = 65_536
_MEMORY = 0.9  # of the averages, a log step; each estimate alone is very noisy


class GradientNoise:
    """Averages the terms of the noise scale over log steps, in units of one rank's batch."""

    def __init__(self) -> None:
        self._terms: list[float] | None = None

    def measure(self, gradients: Sequence[Tensor], ranks: int, mean: Callable[[Tensor], Tensor]) -> float:
        """Return the noise scale: how many batches of one rank make a batch beyond which more helps little.

        Args:
            gradients: Of this rank, flat.
            ranks: How many ranks there are, at least 2.
            mean: Averages a tensor over ranks.
        """
        stride = max(1, sum(gradient.numel() for gradient in gradients) // _MOST_ENTRIES)
        sample = torch.cat([gradient[::stride].float() for gradient in gradients])
        averaged = mean(torch.cat([sample, sample.square().sum().view(1)]))
        terms = noise_scale_terms(averaged[-1], averaged[:-1].square().sum(), 1, ranks)
        now = [float(term) for term in terms]
        if self._terms is not None:
            now = [_MEMORY * old + (1 - _MEMORY) * new for old, new in zip(self._terms, now, strict=True)]
        if all(map(math.isfinite, now)):
            self._terms = now
        noise, signal = self._terms or (math.nan, math.nan)
        return noise / signal if signal > 0 else math.inf

    def state_dict(self) -> list[float] | None:
        """Return the averages."""
        return self._terms

    def load_state_dict(self, state: list[float] | None) -> None:
        """Go on with saved averages."""
        self._terms = state
