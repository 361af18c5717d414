"""Count what autograd saves for the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class SavedActivations:
    """Count the bytes of all tensors that autograd saves inside the block, each memory once.

    The counts are exact: autograd calls this class with every tensor that it saves. Parameters and buffers are in memory
    anyway; list them in ``ignored``.

    Args:
        ignored: Tensors that do not count.
        seen: Called with each saved tensor that counts, also if its memory is known.

    Attributes:
        bytes: Bytes so far.

    Example:
        >>> layers = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.ones(16, 4)
        >>> with SavedActivations(layers.parameters()) as saved:
        ...     loss = layers(x).sum()
        >>> saved.bytes == 4 * (16 * 4 + 16 * 8)  # the inputs of both layers
        True
        >>> layers[0].requires_grad_(False)
        Linear(in_features=4, out_features=8, bias=True)
        >>> with SavedActivations(layers.parameters()) as saved:
        ...     loss = layers(x).sum()
        >>> saved.bytes == 4 * 16 * 8
        True
    """

    def __init__(self, ignored: Iterable[Tensor] = (), seen: Callable[[Tensor], object] | None = None) -> None:
        self.bytes = 0
        self._ignored = list(ignored)
        self._seen = seen
        self._present: set[int] = set()
        self._known: set[int] = set()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._save, lambda tensor: tensor)

    def __enter__(self) -> SavedActivations:
        self.bytes = 0
        self._known = set()
        self._present = {tensor.untyped_storage().data_ptr() for tensor in self._ignored}
        self._hooks.__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        self._hooks.__exit__(*args)

    def _save(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self._present:
            return tensor
        if storage.data_ptr() not in self._known:  # the graph keeps the tensor, so no later one can have its address
            self._known.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        if self._seen is not None:
            self._seen(tensor)
        return tensor
