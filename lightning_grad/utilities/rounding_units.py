"""The layers and blocks of a network whose outputs decide how their weights are rounded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_grad.functional import SoftRounding
from lightning_grad.utilities.forward_order import has_torch_forward
from lightning_grad.utilities.parameters import clean_name, matches

Run = Callable[[], object]


@dataclass
class RoundableWeight:
    """A weight to round, and how to make the network compute with other values.

    Args:
        name: Full name of the parameter.
        weight: Its values.
        owners: Modules that use it; several if it is tied.
        show: Makes the network compute with a tensor in place of the weight, or with the weight again (``None``).
        bits: Bits of its grid.
        dim: Dimension of the output channels.
        kept: Where it keeps its values.
    """

    name: str
    weight: Tensor
    owners: Sequence[nn.Module]
    show: Callable[[Tensor | None], None]
    bits: int
    dim: int = 0
    kept: Tensor | None = None

    def start(self) -> SoftRounding:
        """Return the rounding at its start."""
        return SoftRounding(self.weight, self.bits, self.dim, kept=self.kept)


@dataclass
class Unit:
    """A layer or block whose output is reconstructed.

    Args:
        name: Name of the module.
        module: The module.
        weights: Weights in it that are rounded together.
    """

    name: str
    module: nn.Module
    weights: list[RoundableWeight] = field(default_factory=list)

    @property
    def is_layer(self) -> bool:
        """Whether it is a single layer of torch that is linear in its only weight."""
        kinds = (nn.Linear, _ConvNd)
        is_linear = isinstance(self.module, kinds) and not isinstance(self.module, _ConvTransposeNd)
        is_own = len(self.weights) == 1 and list(self.weights[0].owners) == [self.module]
        return is_linear and is_own and has_torch_forward(self.module)


def called_modules(root: nn.Module, run: Run) -> dict[nn.Module, int]:
    """Return the modules that a run calls, with the order of their first call; without the root."""
    order: dict[nn.Module, int] = {}

    def hook(module: nn.Module, *_: Any) -> None:
        order.setdefault(module, len(order))

    with hooks(module.register_forward_pre_hook(hook) for module in root.modules() if _takeshooks(module, root)):
        run()
    return order


def _takeshooks(module: nn.Module, root: nn.Module) -> bool:
    return module is not root and not isinstance(module, torch.jit.ScriptModule)


@contextmanager
def hooks(handles: Iterable[Any]) -> Iterator[None]:
    """Remove hooks at the end of a block."""
    kept = list(handles)
    try:
        yield
    finally:
        for handle in kept:
            handle.remove()


def find_units(
    root: nn.Module,
    weights: Sequence[RoundableWeight],
    called: dict[nn.Module, int],
    blocks: Sequence[str] = (),
) -> tuple[list[Unit], list[RoundableWeight]]:
    """Return the layers and blocks to reconstruct, in the order of the forward pass, and the weights that no run uses.

    The unit of a weight is the outermost module that ``blocks`` names, else its layer. A layer whose ``forward`` is never
    called, such as the output projection of ``MultiheadAttention``, belongs to the module around it.

    Args:
        root: The network.
        weights: The weights.
        called: Result of :func:`called_modules`.
        blocks: Names or wildcards of modules.

    Raises:
        ValueError: If a block contains no weight to round, or the forward pass does not call it.
    """
    paths = {module: name for name, module in root.named_modules()}
    units: dict[nn.Module, Unit] = {}
    unused, used_blocks = [], set[str]()
    for weight in weights:
        found = [_unit_of(paths[owner], root, called, blocks, used_blocks) for owner in weight.owners]
        names = [name for name in found if name is not None]
        if not names:
            unused.append(weight)
            continue
        name = min(names, key=lambda each: called[root.get_submodule(each)])
        module = root.get_submodule(name)
        units.setdefault(module, Unit(name, module)).weights.append(weight)
    missing = [pattern for pattern in blocks if pattern not in used_blocks]
    if missing:
        raise ValueError(
            f"blocks={list(blocks)!r}: {missing[0]!r} contains no weight to round. Remove it, or include more."
        )
    return sorted(units.values(), key=lambda unit: called[unit.module]), unused


def _unit_of(
    path: str, root: nn.Module, called: dict[nn.Module, int], blocks: Sequence[str], used_blocks: set[str]
) -> str | None:
    """Return the name of the module by whose output the weights of a module are rounded."""
    parts = path.split(".")
    names = [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]  # from the outside in
    block = next((name for name in names if blocks and _is_block(name, blocks)), None)
    if block is None:
        return next((each for each in names[::-1] if root.get_submodule(each) in called), None)
    used_blocks |= {pattern for pattern in blocks if _is_block(block, [pattern])}
    if root.get_submodule(block) not in called:
        raise ValueError(
            f"blocks={list(blocks)!r} names {clean_name(block)}, whose forward is not called. Name modules that are "
            "called as a whole, such as one layer of an encoder."
        )
    return block


def _is_block(name: str, blocks: Sequence[str]) -> bool:
    clean = clean_name(name)
    outer = clean.rpartition(".")[0]
    return matches(clean, blocks) and not (outer and matches(outer, blocks))
