"""The layers of a module as people count them: the blocks of a stack, and what stands before and after them."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from lightning_grad.utilities.parameters import all_names, clean_name, matches

_IN_ORDER = (nn.Sequential, nn.ModuleList)
_CONTAINERS = (*_IN_ORDER, nn.ModuleDict)

ROOT = "root"
"""Name of the layer that holds the parameters of the root module itself."""


def layers_of(module: nn.Module, patterns: Sequence[str] | None = None) -> dict[str, str]:
    """Return the layer of each parameter, by all names of the parameter.

    The items of a stack (two or more of one class that have parts, in a ModuleList or Sequential) are layers. Around
    stacks, each child that holds parameters is a layer, and containers are opened. One that holds only vectors, such as
    a norm, belongs to the layer that is registered before it. The parameters that a module with several layers owns
    itself are one layer, with the name of the module or, for the root module, ``root``.

    Args:
        module: The root module.
        patterns: Names or wildcards of modules that are layers, whatever is in them; the outermost match counts.

    Example:
        >>> block = lambda: nn.ModuleDict({"attend": nn.Linear(2, 2), "mix": nn.Linear(2, 2)})
        >>> net = nn.ModuleDict({"embed": nn.Embedding(3, 2), "blocks": nn.ModuleList([block(), block()])})
        >>> list(dict.fromkeys(layers_of(net).values()))
        ['embed', 'blocks.0', 'blocks.1']
        >>> list(dict.fromkeys(layers_of(net, ["blocks"]).values()))
        ['embed', 'blocks']
    """
    found = list(dict.fromkeys(_layers("", module, is_root=True)))
    own = {name: _owner(name, set(found)) or ROOT for names in all_names(module).values() for name in names}
    joined = _with_norms(found, {own[name] for name in _matrices(module)})
    asked, layers = patterns or (), {name: joined.get(layer, layer) for name, layer in own.items()}
    return {name: _given(name, asked) or _given(layer, asked) or layer for name, layer in layers.items()}


def placing_names(module: nn.Module, layers: Mapping[str, str]) -> list[str]:
    """Return the parameters whose calls place a layer in the forward order: its matrices, or all if it has none.

    A norm is in a layer by its registration, and may be called elsewhere.

    Args:
        module: The root module.
        layers: The layer of each parameter, from :func:`layers_of`.
    """
    matrices = _matrices(module)
    placed = {layers[name] for name in matrices}
    return [name for name, layer in layers.items() if name in matrices or layer not in placed]


def _matrices(module: nn.Module) -> set[str]:
    names = all_names(module)
    may_be = [p for p in module.parameters() if isinstance(p, UninitializedParameter) or p.ndim > 1]
    return {name for parameter in may_be for name in names[id(parameter)]}


def _with_norms(found: Sequence[str], with_matrices: set[str]) -> dict[str, str]:
    """Return the layer that each module belongs to: a module without matrices to the layer before it, if there is one.

    A module that is opened keeps the parameters that it owns.
    """
    joined: dict[str, str] = {}
    before = None
    for layer in found:
        is_opened = any(other.startswith(f"{layer}.") for other in found)
        if before is None or layer in with_matrices or is_opened:
            before = layer
        joined[layer] = before
    return joined


def _layers(name: str, module: nn.Module, is_root: bool = False) -> Iterator[str]:
    if isinstance(module, torch._dynamo.OptimizedModule):
        yield from _layers(name, module._orig_mod, is_root)
        return
    children = [(f"{name}.{part}".strip("."), child) for part, child in module.named_children() if _has_any(child)]
    if _is_stack(module):
        yield from (clean_name(part) for part, _ in children)
    elif is_root or isinstance(module, _CONTAINERS) or any(map(_is_stack, module.modules())):
        owns = any(True for _ in module.parameters(recurse=False))
        yield from [clean_name(name)] * owns
        for part, child in children:
            yield from _layers(part, child, is_root and len(children) == 1 and not owns)
    else:
        yield clean_name(name)


def _has_any(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _is_stack(module: nn.Module) -> bool:
    """Return True for a container with two or more items of one class that have parts with parameters."""
    items = module.children() if isinstance(module, _IN_ORDER) else ()
    kinds = Counter(type(item) for item in items if any(map(_has_any, item.children())))
    return max(kinds.values(), default=0) > 1


def _levels(name: str) -> list[str]:
    """Return the names of the modules above a parameter, from the outermost."""
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts))]


def _given(name: str, patterns: Sequence[str]) -> str | None:
    return next((level for level in [*_levels(name), name] if matches([level], patterns)), None)


def _owner(name: str, found: set[str]) -> str | None:
    return next((level for level in reversed(_levels(name)) if level in found), None)
