"""Data sets that take a list of indices and return a batch, as ``DataLoader(batch_size=None)`` reads them."""

from __future__ import annotations

from typing import Any


class ListItems:
    """The items of such a data set one at a time, each as a batch of one.

    Args:
        dataset: The data set.

    Example:
        >>> import torch
        >>> ListItems(torch.arange(5) * 2)[3]
        tensor([6])
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[[index]]
