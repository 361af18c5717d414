"""One value per sample, recorded over the batches of an epoch."""

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_grad.core.ranks import mean_over_ranks


class EpochRecord:
    """Values of the samples of this epoch, on the device of the first batch; nan for samples not drawn yet."""

    def __init__(self) -> None:
        self.values: Tensor | None = None

    def put(self, indices: list[int], values: Tensor, total: int) -> None:
        """Record the values of a batch.

        Args:
            indices: Indices of its samples in the data set; if one occurs twice, its last value counts.
            values: Values of its samples, of shape (B,).
            total: Length of the data set.

        Raises:
            RuntimeError: If the numbers of values and indices differ.
        """
        if len(values) != len(indices):
            raise RuntimeError(
                f"The loss has {len(values)} rows and the batch has {len(indices)} samples, so rows cannot be "
                "matched with samples. Return one loss row per sample of the batch."
            )
        if self.values is None:
            self.values = torch.full((total,), float("nan"), device=values.device)
        self.values = self.values.to(values.device)  # a resumed run loads them on the CPU
        rows = {index: row for row, index in enumerate(indices)}
        if len(rows) < len(indices):  # which of two writes to one place comes last is undefined on a GPU
            indices, values = list(rows), values[torch.tensor(list(rows.values()), device=values.device)]
        self.values[torch.tensor(indices, device=values.device)] = values.detach().to(self.values.dtype)

    def take(self, trainer: pl.Trainer) -> Tensor | None:
        """Return the values of all ranks, (n,) on the CPU, and clear the record; ``None`` if it was empty."""
        if self.values is None:
            return None
        merged = mean_over_ranks(trainer, self.values).cpu()
        self.values = None
        return merged
