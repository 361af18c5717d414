"""Lists of gradients as one thing: on several devices, in several dtypes, sharded (DTensor) or not.

What the clipping and conditioning functions beside this file are made of. Everything is in place or returns tensors;
nothing waits for the device.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)
_SMALL = 4096


def is_sharded(tensor: Tensor) -> bool:
    """Say whether a tensor is a DTensor, of which this rank holds a part."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """Return a plain tensor; of a DTensor, what all ranks hold together."""
    sharded: Any = tensor
    return sharded.full_tensor() if is_sharded(tensor) else tensor


def shards(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return what this rank holds of each tensor, sharing its memory: enough for what acts on each entry alone."""
    return [tensor.to_local() if is_sharded(tensor) else tensor for tensor in tensors]  # type: ignore[attr-defined]


def by_device(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Return the positions of the tensors on each device."""
    devices = [tensor.device for tensor in tensors]
    return [[i for i, other in enumerate(devices) if other == device] for device in dict.fromkeys(devices)]


def tensor_norms(tensors: Sequence[Tensor], norm_type: float = 2.0, accurate: bool = False) -> list[Tensor]:
    """Return the p-norm of each tensor, where it lies.

    Args:
        tensors: Of any shape.
        norm_type: p.
        accurate: Add up half precision in float32.
    """
    sharded = [is_sharded(tensor) for tensor in tensors]
    if not any(sharded):
        return _plain_norms(tensors, norm_type, accurate)
    if norm_type == torch.inf:
        pairs = zip(tensors, sharded, strict=True)
        return [_largest_of_shards(t) if own else _plain_norms([t], norm_type)[0] for t, own in pairs]
    norms: list[Tensor | None] = [None] * len(tensors)
    for kind in set(sharded):  # torch takes a list of one kind only
        positions = [i for i, own in enumerate(sharded) if own == kind]
        for i, norm in zip(positions, _plain_norms([tensors[i] for i in positions], norm_type, accurate), strict=True):
            norms[i] = norm
    return [norm for norm in norms if norm is not None]


def _plain_norms(tensors: Sequence[Tensor], norm_type: float, accurate: bool = False) -> list[Tensor]:
    if norm_type == torch.inf:  # of nothing it is undefined
        tensors = [tensor if tensor.numel() else tensor.new_zeros(1) for tensor in tensors]
    dtypes = {tensor.dtype for tensor in tensors}
    if not accurate or dtypes.isdisjoint(_HALF):
        return list(torch._foreach_norm(list(tensors), norm_type))
    if dtypes <= {*_HALF, torch.float32}:
        return list(torch._foreach_norm(list(tensors), norm_type, torch.float32))
    return list(torch._foreach_norm([t.float() if t.dtype in _HALF else t for t in tensors], norm_type))


def _largest_of_shards(tensor: Any) -> Tensor:
    """Return the largest magnitude of a DTensor, of which a rank may hold nothing."""
    from torch.distributed.tensor import DTensor, Partial

    (own,) = _plain_norms([tensor.to_local()], torch.inf)
    return DTensor.from_local(own, tensor.device_mesh, [Partial("max")] * tensor.device_mesh.ndim, run_check=False)


def stack_norms(tensors: Sequence[Tensor | None], norm_type: float = 2.0) -> Tensor:
    """Return the p-norms of tensors, of whole ones where they are sharded, as one vector on the first one's device.

    Args:
        tensors: Of any shape, at least one; ``None`` counts as zero.
        norm_type: p.
    """
    norms = tensor_norms([tensor for tensor in tensors if tensor is not None], norm_type, accurate=True)
    if len(norms) < len(tensors):
        zero, found = torch.zeros_like(norms[0]), iter(norms)
        norms = [zero if tensor is None else next(found) for tensor in tensors]
    return whole(stack(norms))


def stack(values: Sequence[Tensor]) -> Tensor:
    """Return scalars as one vector on the device of the first, a DTensor if all of them are."""
    sharded = [is_sharded(value) for value in values]
    if any(sharded) and not all(sharded):
        values = [whole(value) for value in values]
    if len({value.device for value in values}) > 1:
        values = [value.to(values[0].device) for value in values]
    return torch.stack(list(values))


def joined_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the 2-norm of all tensors as one vector, in at least float32.

    Small tensors are joined first: of many, the calls cost more than the numbers. So it may differ from torch's own norm in
    the last digits.
    """
    if len({tensor.device for tensor in tensors}) > 1 or any(is_sharded(tensor) for tensor in tensors):
        return whole(torch.linalg.vector_norm(stack_norms(tensors)))
    small = [tensor for tensor in tensors if tensor.numel() <= _SMALL]
    large = [tensor for tensor in tensors if tensor.numel() > _SMALL]
    norms = tensor_norms(large, accurate=True) if large else []
    if small:
        joined = torch._utils._flatten_dense_tensors(small)  # type: ignore[no-untyped-call]
        norms += tensor_norms([joined], accurate=True)
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def any_rank(flags: Tensor, of: Sequence[Tensor]) -> Tensor:
    """Return which flags are true on some rank, where the tensors that they are about are sharded.

    Args:
        flags: (tensors,) bool, what this rank has found in its shards.
        of: The tensors.

    Returns:
        Tensor: (tensors,) bool, the same on every rank.
    """
    meshes = [tensor.device_mesh for tensor in of if is_sharded(tensor)]  # type: ignore[attr-defined]
    for mesh in dict.fromkeys(meshes):  # in the same order on every rank, which a set would not keep
        from torch.distributed.tensor import DTensor, Partial

        counts = DTensor.from_local(flags.float(), mesh, [Partial()] * mesh.ndim, run_check=False)
        flags = whole(counts) > 0
    return flags


def multiply_(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply tensors by one number that stays on its device, in place."""
    local = shards(tensors)
    if len({tensor.device for tensor in local}) == 1:
        torch._foreach_mul_(local, factor.to(local[0].device))
        return
    for positions in by_device(local):
        group = [local[i] for i in positions]
        torch._foreach_mul_(group, factor.to(group[0].device))


def share_of(flags: Sequence[Tensor]) -> Tensor:
    """Return the share of entries that are true, of all flags together, as a scalar.

    Example:
        >>> share_of([torch.tensor([True, False]), torch.tensor([False, False])])
        tensor(0.2500)
    """
    return stack([whole(flag.sum()) for flag in flags]).sum() / sum(flag.numel() for flag in flags)
