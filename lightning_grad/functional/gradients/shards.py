"""Weights that ``fully_shard`` (FSDP2) spreads over ranks: rules that act on the shards, and what all shards make up.

Between the steps, a parameter is a DTensor of which each rank holds some rows. From the forward to the backward pass of
its layer, FSDP2 puts the whole weight in its place.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_grad.functional.gradients.tensor_lists import is_sharded, whole
from lightning_grad.functional.torch_version import TORCH


def sharded_dims(tensor: Tensor) -> set[int]:
    """Return the dimensions along which a DTensor is cut into shards; none of a plain tensor."""
    # By attribute: _StridedShard, which FSDP2 uses with tensor parallelism, is not a Shard.
    found = [getattr(placement, "dim", None) for placement in getattr(tensor, "placements", ())]
    return {dim for dim in found if dim is not None}


def is_tensor_parallel(tensor: Any) -> bool:
    """Return True if a DTensor stays one in the forward pass; Lightning gives tensor parallelism a dimension of the mesh."""
    return is_sharded(tensor) and "tensor_parallel" in (tensor.device_mesh.mesh_dim_names or ())


def on_shard(rule: Callable[[Tensor], Tensor], weight: Tensor) -> Tensor:
    """Apply a rule to this rank's shard, and return the result as a DTensor like the weight.

    Args:
        rule: Function that returns a tensor of the same shape, and for which the shard is enough.
        weight: A DTensor, or a plain tensor, to which the rule is applied as it is.
    """
    sharded: Any = weight
    return as_shard(rule(sharded.to_local()), weight) if is_sharded(weight) else rule(weight)


def as_shard(local: Tensor, like: Any, rows_along: int | None = None) -> Tensor:
    """Return the DTensor of which this rank holds a part.

    Args:
        local: The part, in the shape of this rank's shard of ``like``.
        like: A DTensor.
        rows_along: Set it if ``local`` is instead a matrix with one row for each index of this dimension, along which
            ``like`` is sharded.
    """
    from torch.distributed.tensor import DTensor, Shard

    # Shards may differ in size, so the shape of the whole tensor cannot be inferred from one of them.
    shape, stride, placements = like.shape, like.stride(), like.placements
    if rows_along is not None:
        shape, stride = torch.Size((shape[rows_along], local.shape[1])), (local.shape[1], 1)
        placements = [placement if getattr(placement, "dim", None) is None else Shard(0) for placement in placements]
    return DTensor.from_local(local, like.device_mesh, placements, run_check=False, shape=shape, stride=stride)


def shard_of(tensor: Tensor, like: Any) -> Tensor:
    """Return a tensor that all ranks hold as a DTensor like another, without communication; as it is if that is plain."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    # Before torch 2.7 distribute_tensor cannot take each rank's own values.
    if TORCH < (2, 7):
        copies = DTensor.from_local(tensor, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)
        return copies.redistribute(placements=like.placements)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def sum_over_shards(value: Tensor, like: Any) -> Tensor:
    """Return the sum of what each rank computed from its shard of a DTensor; of a plain tensor, the value itself."""
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import DTensor, Partial, Replicate

    parts = [Replicate() if getattr(placement, "dim", None) is None else Partial() for placement in like.placements]
    return whole(DTensor.from_local(value, like.device_mesh, parts, run_check=False))


def is_dtensor(tensor: Tensor) -> bool:
    """Return True for a DTensor. Unlike ``is_sharded``, compiled code can ask this."""
    return type(tensor).__name__ == "DTensor"


def as_used(values: Tensor, weight: Tensor) -> Tensor:
    """Return values computed from shards for a weight that the forward pass uses, which FSDP2 has gathered and cast.

    All ranks must call it, because it gathers the values of all shards.

    Args:
        values: Values of the weight's shape, sharded like it or not.
        weight: The weight in use; still a DTensor, of a smaller mesh, under tensor parallelism.
    """
    given: Any = values
    used: Any = weight
    if not is_dtensor(values) or (is_dtensor(weight) and used.device_mesh == given.device_mesh):
        return values
    given = given.to(weight.dtype) if values.is_floating_point() else given  # cast first: fewer bytes to gather
    # Under tensor parallelism as well, FSDP2 has gathered the weight over its own ranks only.
    return shard_of(given.full_tensor(), weight)


def is_fully_sharded(layer: nn.Module) -> bool:
    """Return True if a layer belongs to a module that ``fully_shard`` was called for."""
    return getattr(layer, "_is_fsdp_managed_module", False) is True


@torch.no_grad()
def reshard(module: nn.Module) -> None:
    """Put the shards back in the place of weights that FSDP2 keeps whole after a forward pass without a backward pass.

    It does so with the parameters of the root, which would not show what is written into the shards, and which are not
    those of the optimizer.
    """
    for child in module.modules():
        if any(cls.__name__ == "FSDPModule" for cls in type(child).__mro__):
            child.reshard()  # type: ignore[operator]
