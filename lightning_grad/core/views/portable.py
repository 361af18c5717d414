"""Checkpoints that load without lightning-grad and still resume exactly.

A checkpoint holds the *stored* weights (those of inference) under the plain keys. The technique's
own state holds their residuals, which restore the dense weights bit for bit. Both are
written and read by wrapping the module's ``on_save_checkpoint`` and ``on_load_checkpoint``.
Lightning calls the first after every callback, also with ``save_weights_only``, and the second
before anything is loaded. So weight averaging, which replaces ``checkpoint["state_dict"]``, gets
its dense average back, whatever its position in the list of callbacks. What the module's own hooks
do, such as renaming keys, runs after our code on saving and before it on loading.
"""

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from lightning_grad.core.dispatch import wrap_method
from lightning_grad.core.views.weight_view import WeightView
from lightning_grad.functional.gradients.shards import shard_of
from lightning_grad.functional.gradients.tensor_lists import is_sharded, whole

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_RESIDUALS = "residuals"


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(_BITS[tensor.element_size()])


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a mask into one bit per entry, in a flat uint8 tensor on the CPU. A DTensor is gathered, by all ranks.

    Example:
        >>> pack_bits(torch.tensor([1.0, 0.0, 1.0]))
        tensor([160], dtype=torch.uint8)
    """
    return torch.from_numpy(np.packbits(whole(mask != 0).cpu().numpy()))


def unpack_bits(packed: Tensor, like: Tensor) -> Tensor:
    """Return the bool mask that :func:`pack_bits` packed, in the shape and on the device of ``like``.

    Example:
        >>> unpack_bits(torch.tensor([160], dtype=torch.uint8), like=torch.zeros(3))
        tensor([ True, False,  True])
    """
    bits = np.unpackbits(packed.cpu().numpy(), count=like.numel())
    return shard_of(torch.from_numpy(bits.astype(bool)).view(like.shape).to(like.device), like)


def encode_residual(stored: Tensor, dense: Tensor) -> dict[str, Tensor] | None:
    """Return the difference between the stored and the dense weight: where they differ, and the dense values there.

    Args:
        stored: The weight in the checkpoint.
        dense: The weight from which training continues, of the same shape and dtype.

    Returns:
        dict: ``where`` (packed bits) and ``values``; ``None`` if the two are equal.

    Example:
        >>> encode_residual(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 5.0]))
        {'where': tensor([64], dtype=torch.uint8), 'values': tensor([5.])}
    """
    different = _bits(stored) != _bits(dense)
    if not bool(different.any()):
        return None
    return {"where": pack_bits(different), "values": dense[different].cpu()}


def decode_residual(stored: Tensor, residual: Mapping[str, Tensor]) -> Tensor:
    """Return the dense weight, bit for bit.

    Args:
        stored: The weight in the checkpoint.
        residual: Result of :func:`encode_residual`.

    Example:
        >>> decode_residual(torch.tensor([1.0, 0.0]), {"where": torch.tensor([64]).byte(), "values": torch.tensor([5.0])})
        tensor([1., 5.])
    """
    dense = stored.clone()
    dense[unpack_bits(residual["where"], stored)] = residual["values"].to(stored.device, stored.dtype)
    return dense


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bits(a), _bits(b.to(a.device)))


def make_portable(checkpoint: dict[str, Any], state_key: str, views: Mapping[str, tuple[Tensor, WeightView]]) -> None:
    """Put stored weights into a checkpoint's ``state_dict``, and their residuals into the technique's state.

    Entries that are already the module's stored weights are kept. Any other entry of ``state_dict``
    (an average that a callback put there) is dense, and is replaced by the weights that its validation used.
    Other copies of the module's stored weights in the checkpoint get a residual too.

    Args:
        checkpoint: Checkpoint that Lightning is about to write; changed in place.
        state_key: Key of the technique in ``checkpoint["callbacks"]``.
        views: The current dense weight and the view of each parameter, by its key in
            ``state_dict``.

    Raises:
        RuntimeError: If the technique has no state in the checkpoint that could hold the residuals.
    """
    residuals: dict[str, dict[str, dict[str, Tensor]]] = {}
    for container, tensors in checkpoint.items():
        if not isinstance(tensors, MutableMapping):
            continue
        for key, (dense, view) in views.items():
            if key not in tensors or is_sharded(dense):
                continue
            stored = view.stored(dense.detach())
            if not _same_bits(tensors[key], stored):
                if container != "state_dict":
                    continue
                dense = tensors[key]
                stored = tensors[key] = view.stored(dense)
            residual = encode_residual(stored, dense.detach())
            if residual is not None:
                residuals.setdefault(container, {})[key] = residual
    # Sharded weights last: every rank must gather them, also one whose checkpoint holds no weights.
    for key, (dense, view) in views.items():
        residual = _residual_of_shards(dense.detach(), view) if is_sharded(dense) else None
        if residual is not None:
            residuals.setdefault("state_dict", {})[key] = residual
    states = checkpoint.get("callbacks")
    if states is None:
        return  # a checkpoint with weights only, from which no run resumes
    if state_key in states:
        states[state_key][_RESIDUALS] = residuals
    elif residuals:
        first = next(key for kept in residuals.values() for key in kept)
        raise RuntimeError(
            f"{state_key} cannot save the dense weight of {first!r}, because it has no state in this checkpoint; a "
            f"run that resumes from it would continue from other weights. Make {state_key}.state_dict() extend "
            "super().state_dict(), or save with save_weights_only=True."
        )


def _residual_of_shards(dense: Any, view: WeightView) -> dict[str, Tensor] | None:
    """Return the residual of a whole sharded weight, on the rank that writes it to the checkpoint."""
    stored = whole(view.stored(dense))
    dense_whole = whole(dense)
    return encode_residual(stored, dense_whole) if dense.device_mesh.get_rank() == 0 else None


def make_dense(checkpoint: dict[str, Any], state_key: str, pl_module: pl.LightningModule | None = None) -> None:
    """Undo :func:`make_portable` in a checkpoint before anything is loaded from it.

    Args:
        checkpoint: Checkpoint that Lightning has read; changed in place.
        state_key: Key of the technique in ``checkpoint["callbacks"]``.
        pl_module: The module, if its strategy may load weights itself before any hook is called, as the one for sharded
            weights does: those are restored in the module.
    """
    state = checkpoint.get("callbacks", {}).get(state_key) or {}
    named = () if pl_module is None else pl_module.named_parameters()
    sharded = {name: parameter.detach() for name, parameter in named if is_sharded(parameter)}
    for container, residuals in state.get(_RESIDUALS, {}).items():
        for key, residual in residuals.items():
            if key in checkpoint.get(container, {}):
                checkpoint[container][key] = decode_residual(checkpoint[container][key], residual)
            elif key in sharded and container == "state_dict":
                with torch.no_grad():
                    sharded[key].copy_(shard_of(decode_residual(whole(sharded[key]), residual), sharded[key]))


def wrap_saving(
    pl_module: pl.LightningModule, state_key: str, views: Callable[[], Mapping[str, tuple[Tensor, WeightView]]]
) -> Callable[[], None]:
    """Make every checkpoint of a module portable from now on.

    Returns:
        Callable: Undoes this.
    """

    def save(inner: Callable[..., Any], checkpoint: dict[str, Any]) -> None:
        make_portable(checkpoint, state_key, views())
        inner(checkpoint)

    return wrap_method(pl_module, "on_save_checkpoint", save)


def wrap_loading(pl_module: pl.LightningModule, state_key: str) -> Callable[[], None]:
    """From now on, restore the dense weights in every checkpoint before the module loads it.

    Returns:
        Callable: Undoes this.
    """

    def load(inner: Callable[..., Any], checkpoint: dict[str, Any]) -> None:
        inner(checkpoint)
        make_dense(checkpoint, state_key, pl_module)

    return wrap_method(pl_module, "on_load_checkpoint", load)
