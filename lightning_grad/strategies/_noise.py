"""The noise of the gradient, measured on a sample of its entries before they are compressed.

Used by ``compressed_ddp.py``; the estimate is :func:`lightning_grad.functional.noise_scale_terms`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_grad.functional import noise_scale_terms
from lightning_grad.functional.diagnostics.gradient_statistics import average_noise_terms

_MOST_ENTRIES = 65_536
_DECAY = 0.9  # of the averages, a log step; each estimate alone is very noisy


def measure_noise(
    before: Tensor | None, gradients: Sequence[Tensor], ranks: int, mean: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return averages of noise and signal over log steps, (2,), in units of one rank's batch.

    Args:
        before: Averages so far; ``None`` at first.
        gradients: Of this rank, flat.
        ranks: How many ranks there are, at least 2.
        mean: Averages a tensor over ranks.
    """
    stride = max(1, sum(gradient.numel() for gradient in gradients) // _MOST_ENTRIES)
    sample = torch.cat([gradient[::stride].float() for gradient in gradients])
    averaged = mean(torch.cat([sample, sample.square().sum().view(1)]))
    terms = noise_scale_terms(averaged[-1], averaged[:-1].square().sum(), 1, ranks)
    return average_noise_terms(before, torch.stack(terms).double().cpu(), _DECAY)
