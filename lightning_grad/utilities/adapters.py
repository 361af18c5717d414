"""Small files of adapters: written from a checkpoint, and merged into the pretrained module later."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_grad.functional import merge_lora
from lightning_grad.functional.choices import hint_for
from lightning_grad.utilities.parameters import all_names, clean_name

_FORMAT = "lightning-grad adapters 1"
_Path = str | os.PathLike[str]


def digest_of(weight: Tensor) -> str:
    """Return a digest of the values, type and shape of a weight.

    Example:
        >>> digest_of(torch.zeros(2, 2)) == digest_of(torch.zeros(4)), digest_of(torch.ones(2)) == digest_of(torch.ones(2))
        (False, True)
    """
    value = weight.detach().cpu().contiguous()
    found = hashlib.sha256(f"{value.dtype} {tuple(value.shape)}".encode())
    found.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def save_adapters(checkpoint: _Path | Mapping[str, Any], path: _Path) -> None:
    """Write the adapters of a checkpoint, and what else has trained, to a small file.

    The file has the factors of each adapter, a digest of each pretrained weight, and the values of the parameters and
    buffers that the fit could change, such as a new head and the statistics of BatchNorm. ``torch.save`` writes it, so it
    needs no other package, and :func:`load_adapters` reads it with ``weights_only=True``.

    Args:
        checkpoint: Checkpoint of a fit with :class:`~lightning_grad.callbacks.LoRA`, or its path.
        path: Path of the new file.

    Raises:
        ValueError: If the checkpoint has no adapters.
    """
    is_read = isinstance(checkpoint, Mapping)
    found: Mapping[str, Any] = checkpoint if is_read else torch.load(checkpoint, map_location="cpu", weights_only=True)  # type: ignore[assignment, arg-type]
    states = [s for s in found.get("callbacks", {}).values() if isinstance(s, Mapping) and s.get("adapters")]
    if not states:
        raise ValueError(
            "The checkpoint has no adapters. Use one that a fit with LoRA has saved, without save_weights_only=True."
        )
    weights = {clean_name(name): value for name, value in found["state_dict"].items()}
    adapters = {name: _factors(name, each) for state in states for name, each in state["adapters"].items()}
    others = {name: weights[name] for state in states for name in state["others"] if name in weights}
    torch.save({"format": _FORMAT, "adapters": adapters, "others": others}, path)


def _factors(name: str, state: Mapping[str, Any]) -> dict[str, Any]:
    if "lora_A" not in state:
        raise ValueError(f"The adapter of {name!r} is not low-rank, so it is not smaller than the weight itself.")
    a, b = state["lora_A"], state["lora_B"]
    if "lora_A_start" in state:  # the pretrained weight was shifted by the product that the run started with
        a, b = torch.cat([a, state["lora_A_start"]]), torch.cat([b, -state["lora_B_start"]], dim=1)
    return {"a": a.clone(), "b": b.clone(), **{key: state[key] for key in ("scale", "is_transposed", "digest")}}


def load_adapters(module: nn.Module, path: _Path) -> None:
    """Merge a file of adapters into the pretrained module that they were trained on, in place.

    With ``init="default"``, the weights are then bitwise those of the checkpoint that the file is from; with "ga", up to
    rounding, because the run trained on shifted weights. After a run that converted the module (``precision="bf16-true"``),
    the module must have the type that it had before, and the weights differ by the rounding of that type.
    Nothing is changed if anything does not fit.

    Args:
        module: Module with the pretrained weights and the names of the one that was trained, usually the LightningModule.
        path: File that :func:`save_adapters` wrote.

    Raises:
        ValueError: If the file is of another kind, a name is missing in the module, a shape differs, or a weight is not the
            one that the adapter was trained on.
    """
    found = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(found, Mapping) or found.get("format") != _FORMAT:
        raise ValueError(
            f"{os.fspath(path)!r} holds no adapters. Write them with lightning_grad.utilities.save_adapters."
        )
    known = dict(_tensors_of(module))
    wanted = {**found["adapters"], **found["others"]}
    missing = [name for name in wanted if name not in known]
    if missing:
        raise ValueError(
            f"The file has {missing[0]!r}, but {type(module).__name__} has no such parameter or buffer."
            f"{hint_for(missing[0], known)} Load it into the module that was trained."
        )
    for name, value in found["others"].items():
        _refuse_shape(name, value.shape, known[name])
    merged = {name: _merge(name, known[name], each) for name, each in found["adapters"].items()}
    with torch.no_grad():
        for name, value in {**merged, **found["others"]}.items():
            known[name].copy_(value)


def _merge(name: str, weight: Tensor, adapter: Mapping[str, Any]) -> Tensor:
    if digest_of(weight) != adapter["digest"]:
        raise ValueError(
            f"The adapter of {name!r} was trained on another weight than the one of the module ({weight.dtype}, "
            f"{tuple(weight.shape)}). Load the pretrained weights first, in the type that the run started with, and merge "
            "adapters only once."
        )
    a, b = (adapter[key].to(weight) for key in ("a", "b"))
    return merge_lora(weight.detach(), a, b, adapter["scale"], adapter["is_transposed"])


def _refuse_shape(name: str, shape: torch.Size, known: Tensor) -> None:
    if shape != known.shape:
        raise ValueError(f"{name!r} must have shape {tuple(shape)}, as in the file; got {tuple(known.shape)}.")


def _tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    parameters = {id(parameter): parameter for parameter in module.parameters()}
    for key, names in all_names(module).items():
        yield from ((name, parameters[key]) for name in names)
    yield from ((clean_name(name), buffer) for name, buffer in module.named_buffers())
