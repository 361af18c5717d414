"""Operations on lists of gradients on several devices, of several dtypes, sharded (DTensor) or not.

They are the building blocks of the functions in ``clipping`` and ``diagnostics``. All of them work in place or return
tensors, without a host sync. On a CPU, where the host may ask, some ask first whether there is anything to do.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)
_SMALL = 4096
_FEW = 1024  # entries; for fewer, two results cost more than torch's slow maximum


def is_sharded(tensor: Tensor) -> bool:
    """Return True for a DTensor, whose shard this rank holds."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """Return the full tensor of a DTensor, and a plain tensor unchanged."""
    sharded: Any = tensor
    return sharded.full_tensor() if is_sharded(tensor) else tensor


def shards(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return this rank's shard of each tensor, sharing memory; sufficient for elementwise operations."""
    return [tensor.to_local() if is_sharded(tensor) else tensor for tensor in tensors]  # type: ignore[attr-defined]


def by_device(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Group the positions of tensors by device."""
    devices = [tensor.device for tensor in tensors]
    return [[i for i, other in enumerate(devices) if other == device] for device in dict.fromkeys(devices)]


def read_flags(flags: Tensor) -> bytes | None:
    """Return bool flags as bytes if they are on the CPU; ``None`` on a device, because the host would wait for it.

    ``numpy()`` raises for a tensor on a device, so no change of this code can turn it into a silent sync.

    Example:
        >>> list(read_flags(torch.tensor([True, False])))
        [1, 0]
    """
    return flags.numpy().tobytes() if flags.is_cpu and not torch.compiler.is_compiling() else None


def is_known(flag: Tensor) -> bool:
    """Return True if a flag of one entry is on the CPU and True."""
    return read_flags(flag) == b"\x01"


def tensor_norms(tensors: Sequence[Tensor], norm_type: float = 2.0, accurate: bool = False) -> list[Tensor]:
    """Return the p-norm of each tensor, on its own device.

    Args:
        tensors: Tensors of any shape.
        norm_type: p.
        accurate: Sum half precision in float32.
    """
    sharded = [is_sharded(tensor) for tensor in tensors]
    if not any(sharded):
        return _plain_norms(tensors, norm_type, accurate)
    if norm_type == torch.inf:
        pairs = zip(tensors, sharded, strict=True)
        return [_largest_of_shards(t) if own else _plain_norms([t], norm_type)[0] for t, own in pairs]
    norms: list[Tensor | None] = [None] * len(tensors)
    for kind in set(sharded):  # torch cannot mix DTensors and plain tensors in one list
        positions = [i for i, own in enumerate(sharded) if own == kind]
        for i, norm in zip(positions, _plain_norms([tensors[i] for i in positions], norm_type, accurate), strict=True):
            norms[i] = norm
    return [norm for norm in norms if norm is not None]


def _plain_norms(tensors: Sequence[Tensor], norm_type: float, accurate: bool = False) -> list[Tensor]:
    if norm_type == torch.inf:
        tensors = [_extremes(tensor) for tensor in tensors]
    dtypes = {tensor.dtype for tensor in tensors}
    if not accurate or dtypes.isdisjoint(_HALF):
        return list(torch._foreach_norm(list(tensors), norm_type))
    if dtypes <= {*_HALF, torch.float32}:
        return list(torch._foreach_norm(list(tensors), norm_type, torch.float32))
    return list(torch._foreach_norm([t.float() if t.dtype in _HALF else t for t in tensors], norm_type))


def _extremes(tensor: Tensor) -> Tensor:
    """Return a tensor with the same largest magnitude that is faster to reduce.

    torch's maximum norm is not vectorized on a CPU, but ``aminmax`` is, and it also keeps nan and infinity.
    """
    if tensor.numel() == 0:  # has no maximum
        return tensor.new_zeros(1)
    is_slow = tensor.is_cpu and tensor.numel() > _FEW and not tensor.is_complex()
    return torch.stack(torch.aminmax(tensor)) if is_slow else tensor


def _largest_of_shards(tensor: Any) -> Tensor:
    """Return the largest magnitude of a DTensor, whose shard on a rank may be empty."""
    from torch.distributed.tensor import DTensor, Partial

    (own,) = _plain_norms([tensor.to_local()], torch.inf)
    return DTensor.from_local(own, tensor.device_mesh, [Partial("max")] * tensor.device_mesh.ndim, run_check=False)


def stack_norms(tensors: Sequence[Tensor | None], norm_type: float = 2.0) -> Tensor:
    """Return the p-norms of tensors as one vector on the device of the first; DTensors count in full.

    Args:
        tensors: One or more tensors of any shape; ``None`` has norm zero.
        norm_type: p.
    """
    norms = tensor_norms([tensor for tensor in tensors if tensor is not None], norm_type, accurate=True)
    if len(norms) < len(tensors):
        zero, found = torch.zeros_like(norms[0]), iter(norms)
        norms = [zero if tensor is None else next(found) for tensor in tensors]
    return whole(stack(norms))


def stack(values: Sequence[Tensor]) -> Tensor:
    """Stack scalars into one vector on the device of the first; a DTensor if all of them are DTensors of one mesh."""
    # With tensor parallelism and FSDP2, only some parameters belong to the mesh of both.
    if len({getattr(value, "device_mesh", None) for value in values}) > 1:
        values = [whole(value) for value in values]
    if len({value.device for value in values}) > 1:
        values = [value.to(values[0].device) for value in values]
    return torch.stack(list(values))


def joined_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the 2-norm of all tensors, concatenated into one vector, in float32 or float64.

    Small tensors are concatenated first, because many kernel launches cost more than the arithmetic. The last digits
    may therefore differ from torch's own norm.
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
    """Combine flags about shards over all ranks: a flag is True if it is True on any rank.

    Args:
        flags: (tensors,) bool, the flags of this rank's shards.
        of: The tensors.

    Returns:
        Tensor: (tensors,) bool, equal on every rank.
    """
    meshes = [tensor.device_mesh for tensor in of if is_sharded(tensor)]  # type: ignore[attr-defined]
    for mesh in dict.fromkeys(meshes):  # not a set, because the order must be equal on all ranks
        from torch.distributed.tensor import DTensor, Partial

        counts = DTensor.from_local(flags.float(), mesh, [Partial()] * mesh.ndim, run_check=False)
        flags = whole(counts) > 0
    return flags


def multiply_(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply tensors in place by a scalar tensor, without a host sync; on a CPU a factor of 1 costs nothing."""
    local = shards(tensors)
    if is_known(factor == 1.0) and not any(tensor.is_complex() for tensor in local):  # it clears the sign of a zero
        return
    if len({tensor.device for tensor in local}) == 1:
        torch._foreach_mul_(local, factor.to(local[0].device))
        return
    for positions in by_device(local):
        group = [local[i] for i in positions]
        torch._foreach_mul_(group, factor.to(group[0].device))


def share_of(flags: Iterable[Tensor]) -> Tensor:
    """Return the fraction of true entries in all flags, as a scalar. From a generator, only one flag exists at a time.

    Example:
        >>> share_of([torch.tensor([True, False]), torch.tensor([False, False])])
        tensor(0.2500)
    """
    counts = [(whole(flag.sum()), flag.numel()) for flag in flags]
    return stack([count for count, _ in counts]).sum() / sum(size for _, size in counts)
