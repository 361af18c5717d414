"""The layers of a network whose outputs are maps of its input image, and the choice of one of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn

from lightning_grad.functional import OutputCapture, feature_map

_MIXES_TOKENS = re.compile("attention|attn|mhs?a", re.IGNORECASE)  # in the name of a class


@dataclass(frozen=True, eq=False)
class LayerMap:
    """One call of a layer that returned a map.

    Args:
        name: Name of the layer.
        output: Its output.
        copy: The copy of the output that the network continued with.
    """

    name: str
    output: Tensor
    copy: Tensor


class LayerMaps:
    """Keep the maps of layers during one forward pass.

    Args:
        layers: Layers by name.
        samples: B, the number of images.
        size: Height and width of the images.

    Attributes:
        shapes: Shape of the last floating-point output of each layer.
    """

    def __init__(self, layers: Mapping[str, nn.Module], samples: int, size: tuple[int, int]) -> None:
        self._samples, self._size = samples, size
        self._captures = {name: OutputCapture(layer, partial(self._is_map, name)) for name, layer in layers.items()}
        self._order: list[str] = []  # of the calls; named_modules() has a block before its layers
        self._sequences: set[int] = set()  # numbers of tokens
        self.shapes: dict[str, tuple[int, ...]] = {}

    def __enter__(self) -> Self:
        self._stack = ExitStack()
        for capture in self._captures.values():
            self._stack.enter_context(capture)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _is_map(self, name: str, output: Tensor) -> bool:
        self.shapes[name] = tuple(output.shape)
        is_map = feature_map(output, self._samples, self._size) is not None
        if is_map and output.dim() == 3:
            self._sequences.add(output.shape[1])
        # The weights (B, heads, T, T), queries and keys of an attention have four dimensions too.
        is_map = is_map and not (output.dim() == 4 and self._sequences & set(output.shape[1:3]))
        if is_map:
            self._order.append(name)
        return is_map

    def last_first(self) -> list[LayerMap]:
        """Return the maps, that of the last call first."""
        kept = {name: list(zip(each.outputs, each.copies, strict=True)) for name, each in self._captures.items()}
        return [LayerMap(name, *kept[name].pop()) for name in reversed(self._order)]


def parts_of_attention(module: nn.Module) -> set[str]:
    """Return the names of all layers inside an attention, such as the projections of queries, keys and values."""
    found: set[str] = set()
    for name, each in module.named_modules():
        if name and _MIXES_TOKENS.search(type(each).__name__):
            found |= {f"{name}.{inner}" for inner, _ in each.named_modules() if inner}
    return found


def gradients_of(score: Tensor, maps: Sequence[LayerMap]) -> list[Tensor | None]:
    """Return the gradient of a score with respect to each map; ``None`` where the score does not depend on it."""
    if not maps or not score.requires_grad:
        return [None] * len(maps)
    return list(torch.autograd.grad(score, [each.output for each in maps], allow_unused=True))


def innermost(found: LayerMap, maps: Sequence[LayerMap]) -> str:
    """Return the innermost layer that returned this map: the last child of a container, not the container."""
    for other in maps:
        # An in-place layer returns its input, the copy of the layer before it, so only children count.
        if other.name.startswith(f"{found.name}.") and other.copy is found.output:
            return innermost(other, maps)
    return found.name
