"""The identity of a rank file, which keeps files from being mixed up. Used by ``_rank_files.py``."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

IDENTITY, OWN, SHARED = "identity", "own", "shared"

Layout = list[list[int]]  # sizes and strides
Parameters = Mapping[str, Layout]
Memory = Mapping[str, Mapping[str, Tensor]]


def layout_of(parameter: Tensor) -> Layout:
    """Return sizes and strides of a parameter, with stride 0 for dimensions of one entry.

    Residuals are stored in memory order, so a residual fits only a weight with the same memory format.

    Example:
        >>> import torch
        >>> layout_of(torch.zeros(3, 1, 2))
        [[3, 1, 2], [2, 0, 1]]
    """
    steps = zip(parameter.shape, parameter.stride(), strict=True)
    return [list(parameter.shape), [stride if size > 1 else 0 for size, stride in steps]]


def identity_of(manifest: Mapping[str, Any], rank: int, memory: Memory, parameters: Parameters) -> dict[str, Any]:
    """Return the identity of a rank file: its save and rank, and the names, shapes and layouts of its parameters."""
    save = {key: manifest[key] for key in ("strategy", "save", "ranks")}
    known = {name: parameters[name] for name in memory}
    return {**save, "rank": rank, "parameters": known, "memory": _shapes(memory)}


def misfit(content: Any, manifest: Mapping[str, Any], rank: int, parameters: Parameters) -> str:
    """Return why a file does not belong to a rank of a checkpoint, or an empty string.

    Args:
        content: Content of the file.
        manifest: Manifest of the checkpoint.
        rank: Rank to which the file should belong.
        parameters: Layouts of the parameters of the module that resumes.
    """
    identity = content.get(IDENTITY) if isinstance(content, Mapping) else None
    if not isinstance(identity, Mapping) or not {OWN, SHARED} <= content.keys() or "memory" not in content[OWN]:
        return "does not contain the state of a rank"
    if identity.get("strategy") != manifest["strategy"]:
        return f"belongs to {identity.get('strategy')}, not to {manifest['strategy']}"
    if identity.get("save") != manifest["save"]:
        return f"belongs to another checkpoint: its save is {identity.get('save')}, this checkpoint's is {manifest['save']}"
    if (identity.get("rank"), identity.get("ranks")) != (rank, manifest["ranks"]):
        found, of = identity.get("rank"), identity.get("ranks")
        return f"belongs to rank {found} of {of}, not to rank {rank} of {manifest['ranks']}"
    return _misfit_of_memory(content[OWN]["memory"], identity, parameters)


def _misfit_of_memory(memory: Memory, identity: Mapping[str, Any], parameters: Parameters) -> str:
    """Return why a saved memory does not fit the parameters, or an empty string."""
    strangers = sorted(memory.keys() - parameters.keys())
    if strangers:
        return f"belongs to another model: it contains {strangers[0]!r}, which this module does not have"
    if _shapes(memory) != identity["memory"] or memory.keys() != identity["parameters"].keys():
        return "was changed after it was saved: its tensors differ from its own list of them"
    for name, (sizes, strides) in identity["parameters"].items():
        if [sizes, strides] != parameters[name]:
            now_sizes, now_strides = parameters[name]
            if sizes != now_sizes:
                return f"belongs to another model: its {name!r} has shape {sizes}, this module's has {now_sizes}"
            return (
                f"belongs to a model whose {name!r} has strides {strides} in memory; here they are {now_strides}: use the "
                "memory format of the saved run"
            )
    return ""


def _shapes(memory: Memory) -> dict[str, dict[str, list[int]]]:
    return {name: {key: list(value.shape) for key, value in kept.items()} for name, kept in memory.items()}
