"""What a rank file says about itself, so that no other file is taken for it. Used by ``_rank_files.py``."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

IDENTITY, OWN, SHARED = "identity", "own", "shared"

Layout = list[list[int]]  # sizes and strides
Parameters = Mapping[str, Layout]
Memory = Mapping[str, Mapping[str, Tensor]]


def layout_of(parameter: Tensor) -> Layout:
    """Return sizes and strides of a parameter, the strides only of dimensions that have several entries.

    The entries of a residual lie in the order of memory, so a weight in another memory format needs another residual.

    Example:
        >>> import torch
        >>> layout_of(torch.zeros(3, 1, 2))
        [[3, 1, 2], [2, 0, 1]]
    """
    steps = zip(parameter.shape, parameter.stride(), strict=True)
    return [list(parameter.shape), [stride if size > 1 else 0 for size, stride in steps]]


def identity_of(manifest: Mapping[str, Any], rank: int, memory: Memory, parameters: Parameters) -> dict[str, Any]:
    """Return the identity of a rank file: its save, its rank, and the names, shapes and layouts of its parameters."""
    save = {key: manifest[key] for key in ("strategy", "save", "ranks")}
    known = {name: parameters[name] for name in memory}
    return {**save, "rank": rank, "parameters": known, "memory": _shapes(memory)}


def misfit(content: Any, manifest: Mapping[str, Any], rank: int, parameters: Parameters) -> str:
    """Return why a file is not that of a rank of a checkpoint, or an empty text.

    Args:
        content: Of the file.
        manifest: Of the checkpoint.
        rank: Whose file it should be.
        parameters: Of the module that resumes.
    """
    identity = content.get(IDENTITY) if isinstance(content, Mapping) else None
    if not isinstance(identity, Mapping) or not {OWN, SHARED} <= content.keys() or "memory" not in content[OWN]:
        return "holds no state of a rank"
    if identity.get("strategy") != manifest["strategy"]:
        return f"is of {identity.get('strategy')}, not of {manifest['strategy']}"
    if identity.get("save") != manifest["save"]:
        return f"is of another checkpoint: of save {identity.get('save')}, and this one names {manifest['save']}"
    if (identity.get("rank"), identity.get("ranks")) != (rank, manifest["ranks"]):
        found, of = identity.get("rank"), identity.get("ranks")
        return f"is of rank {found} of {of}, not of rank {rank} of {manifest['ranks']}"
    return _misfit_of_memory(content[OWN]["memory"], identity, parameters)


def _misfit_of_memory(memory: Memory, identity: Mapping[str, Any], parameters: Parameters) -> str:
    strangers = sorted(memory.keys() - parameters.keys())
    if strangers:
        return f"is of another model: it holds {strangers[0]!r}, which this module does not have"
    if _shapes(memory) != identity["memory"] or memory.keys() != identity["parameters"].keys():
        return "was changed after it was saved: its tensors are not those that it lists"
    for name, (sizes, strides) in identity["parameters"].items():
        if [sizes, strides] != parameters[name]:
            now_sizes, now_strides = parameters[name]
            if sizes != now_sizes:
                return f"is of another model: there {name!r} has shape {sizes}, here {now_sizes}"
            return (
                f"is of a model whose {name!r} lies in memory with strides {strides}, and here with {now_strides}: use the "
                "memory format of the saved run"
            )
    return ""


def _shapes(memory: Memory) -> dict[str, dict[str, list[int]]]:
    return {name: {key: list(value.shape) for key, value in kept.items()} for name, kept in memory.items()}
