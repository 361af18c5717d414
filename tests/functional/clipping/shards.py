"""Tensors of several shapes, whole and sharded."""

from typing import Any

import torch
from torch import Tensor

NAN, INF = float("nan"), float("inf")

SHAPES = [(), (5,), (4, 6), (3, 2, 5), (4, 3, 2, 2)]


def draw(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).add_(1.0).to(dtype)


def shard(tensor: Tensor, mesh: Any, dim: int = 0) -> Any:
    from torch.distributed.tensor import Shard, distribute_tensor

    return distribute_tensor(tensor.clone(), mesh, [Shard(dim)])


PLACED = [((5, 4), 0), ((4, 6), 1), ((3, 2, 5), 2), ((7,), 0), ((1, 3), 0)]
