"""One value of each sample, as the batches of an epoch bring them."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_grad.core.ranks import mean_over_ranks


class EpochRecord:
    """Values of the samples of this epoch, on the device where they arise; nan for samples that have not come yet."""

    def __init__(self) -> None:
        self.values: Tensor | None = None

    def put(self, indices: list[int], values: Tensor, total: int) -> None:
        """Keep the values of a batch.

        Args:
            indices: Of its samples in the data set.
            values: (B,).
            total: Length of the data set.

        Raises:
            RuntimeError: If the loss was not one of the batch's own samples.
        """
        if len(values) != len(indices):
            raise RuntimeError(
                f"The loss has {len(values)} rows, and the batch {len(indices)} samples: which row belongs to which sample "
                "cannot be told."
            )
        if self.values is None:
            self.values = torch.full((total,), float("nan"), device=values.device)
        self.values = self.values.to(values.device)  # which a resumed run may have elsewhere
        self.values[torch.tensor(indices, device=values.device)] = values.detach().to(self.values.dtype)

    def take(self, trainer: pl.Trainer) -> Tensor | None:
        """Return what all ranks have recorded, (n,) on the CPU, and begin anew; ``None`` if nothing was."""
        if self.values is None:
            return None
        merged = mean_over_ranks(trainer, self.values).cpu()
        self.values = None
        return merged
