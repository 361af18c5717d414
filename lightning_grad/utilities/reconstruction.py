"""Round the weights of a network one layer after another, so that each layer keeps its output.

The layers are visited in the order of the forward pass. Each one is given the inputs that it gets after the layers before
it were rounded, and the outputs that it had before, and learns its roundings from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_grad.functional import (
    LearnedRoundings,
    QuantizedTensor,
    SoftRounding,
    flip_roundings,
    learn_rounding,
)
from lightning_grad.functional.plain_tensors import plain_tensor
from lightning_grad.utilities.batch_copies import copy_of
from lightning_grad.utilities.batches import tensors_in
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


@dataclass(frozen=True)
class RoundedUnit:
    """The result of one unit.

    Args:
        name: Name of the layer or block.
        weights: Its weights.
        found: Their roundings, and the errors.
        values: The rounded weights.
    """

    name: str
    weights: Sequence[RoundableWeight]
    found: LearnedRoundings
    values: Sequence[Tensor]

    @classmethod
    def nearest(cls, weight: RoundableWeight) -> RoundedUnit:
        """Return the rounding of a weight that no forward pass uses: to the nearest levels."""
        start = weight.start()
        return cls(
            weight.name, [weight], LearnedRoundings([start.nearest], 0.0, 0.0, 0.0), [start.values(start.nearest)]
        )

    @property
    def relative_error(self) -> float:
        """Error of the output, relative to that of rounding to the nearest levels; 1 if that has none."""
        return self.found.error / self.found.nearest_error if self.found.nearest_error else 1.0


@dataclass
class _Calls:
    """Calls of a module: arguments and outputs."""

    inputs: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    outputs: list[list[Tensor]] = field(default_factory=list)

    @property
    def shapes(self) -> list[list[torch.Size]]:
        return [[tensor.shape for tensor in tensors_in(each)] for each in self.inputs]


def called_modules(root: nn.Module, run: Run) -> dict[nn.Module, int]:
    """Return the modules that a run calls, with the order of their first call; without the root."""
    order: dict[nn.Module, int] = {}

    def hook(module: nn.Module, *_: Any) -> None:
        order.setdefault(module, len(order))

    with _hooks(module.register_forward_pre_hook(hook) for module in root.modules() if _takes_hooks(module, root)):
        run()
    return order


def _takes_hooks(module: nn.Module, root: nn.Module) -> bool:
    return module is not root and not isinstance(module, torch.jit.ScriptModule)


@contextmanager
def _hooks(handles: Iterator[Any]) -> Iterator[None]:
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


class Reconstruction:
    """Rounds the units of a network, one after another.

    Args:
        units: Result of :func:`find_units`.
        runs: Run the network on one batch each, always with the same result.
        steps: Steps of :func:`learn_rounding` for each unit; 0 rounds to the nearest levels.
        strength: Its penalty.
        flips: Flip single roundings afterwards, in layers that are linear in their weight.
        seed: Seed of the order of the batches.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        runs: Sequence[Run],
        steps: int = 1000,
        strength: float = 10.0,
        flips: bool = True,
        seed: int = 0,
    ) -> None:
        self.units, self._runs = units, runs
        self._steps, self._strength, self._flips, self._seed = steps, strength, flips, seed
        self._weights = [weight for unit in units for weight in unit.weights]

    @torch.no_grad()
    def __iter__(self) -> Iterator[RoundedUnit]:
        """Round one unit after another. Afterwards the network computes with its own weights again."""
        rounded: dict[str, Tensor] = {}
        try:
            for unit in self.units:
                result = self._round(unit, rounded)
                rounded |= {weight.name: value for weight, value in zip(unit.weights, result.values, strict=True)}
                yield result
        finally:
            for weight in self._weights:
                weight.show(None)

    def _round(self, unit: Unit, rounded: dict[str, Tensor]) -> RoundedUnit:
        outcome = _UnitError(unit, *self._calls(unit, rounded))
        starts = [weight.start() for weight in unit.weights]
        count = len(outcome)
        found = learn_rounding(starts, outcome, count, self._steps, self._strength, seed=self._seed)
        if self._steps and self._flips and unit.is_layer and found.nearest_error:
            found = self._flipped(outcome, starts[0], found)
        for weight in unit.weights:
            weight.show(None)
        values = [start.values(each) for start, each in zip(starts, found.rounded, strict=True)]
        return RoundedUnit(unit.name, unit.weights, found, values)

    def _calls(self, unit: Unit, rounded: dict[str, Tensor]) -> tuple[_Calls, _Calls]:
        """Return the calls of a unit in the network as it was, and after the units before it were rounded."""
        for weight in self._weights:
            weight.show(None)
        before = _record(unit.module, self._runs)
        for weight in self._weights:
            weight.show(rounded.get(weight.name))
        after = _record(unit.module, self._runs) if rounded else before
        # Rounding can change which rows a layer gets, as in a mixture of experts; their outputs are then not comparable.
        return before, after if after.shapes == before.shapes else before

    def _flipped(self, outcome: _UnitError, start: SoftRounding, found: LearnedRoundings) -> LearnedRoundings:
        """Flip single roundings, from the learned and from the nearest ones, and keep the better of each channel."""
        learned, nearest = (outcome.flip(start, each) for each in (found.rounded[0], start.nearest))
        errors = [outcome.by_channel(start.values(each)) for each in (learned, nearest)]
        shape = [-1 if at == start.nearest.dim else 1 for at in range(start.weight.ndim)]
        integers = torch.where((errors[0] <= errors[1]).reshape(shape), learned.integers, nearest.integers)
        n = start.nearest
        best = QuantizedTensor(integers, n.scales, n.bits, n.quantizer, n.dim)
        error = outcome.total([start.values(best)])
        if error < found.error:
            return LearnedRoundings([best], found.nearest_error, error, found.undecided)
        return found


def _record(module: nn.Module, runs: Sequence[Run]) -> _Calls:
    """Run the network, and record the calls of a module. Copies, because later layers may change tensors in place."""
    calls = _Calls()

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.inputs.append(copy_of((args, kwargs)))

    def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.outputs.append([tensor.detach().clone() for tensor in _floats(output)])

    pre = module.register_forward_pre_hook(before, with_kwargs=True)
    post = module.register_forward_hook(after, with_kwargs=True)
    with _hooks(iter((pre, post))):
        for run in runs:
            run()
    return calls


class _UnitError:
    """The mean squared error of a unit's output, for given values of its weights.

    Args:
        unit: The unit.
        target: Its calls in the network as it was; their outputs are the target.
        calls: Its calls whose inputs it gets.
    """

    def __init__(self, unit: Unit, target: _Calls, calls: _Calls) -> None:
        self._unit, self._target, self._inputs = unit, target.outputs, calls.inputs

    def __len__(self) -> int:
        return len(self._inputs)

    def __call__(self, values: Sequence[Tensor], batch: int) -> Tensor:
        outputs = self._outputs(values, batch)
        pairs = list(zip(outputs, self._target[batch], strict=True))
        squares = [(_exact(output) - _exact(target)).square().sum() for output, target in pairs]
        return torch.stack(squares).sum() / max(1, sum(target.numel() for _, target in pairs))

    def total(self, values: Sequence[Tensor]) -> float:
        return math.fsum(float(self(values, batch)) for batch in range(len(self))) / len(self)

    def _outputs(self, values: Sequence[Tensor], batch: int) -> list[Tensor]:
        for weight, value in zip(self._unit.weights, values, strict=True):
            weight.show(value)
        inputs = self._inputs[batch]
        args, kwargs = inputs if self._unit.is_layer else copy_of(inputs)  # a block may change its inputs in place
        return _floats(self._unit.module(*args, **kwargs))

    # For layers that are linear in their weight.

    def flip(self, start: SoftRounding, rounded: QuantizedTensor) -> QuantizedTensor:
        """Return the rounding after single flips."""
        gram: Any = 0.0
        cross: Any = 0.0
        count = 0
        for batch in range(len(self)):
            columns, residual = self._columns(batch), self._residual(start.values(rounded), batch)
            groups = columns.shape[0]
            gram = gram + columns.transpose(1, 2) @ columns
            by_group = residual.reshape(len(residual), groups, -1).permute(1, 2, 0)
            cross = cross + (by_group @ columns).flatten(0, 1)
            count += columns.shape[1]
        return flip_roundings(start, rounded, gram / count, cross / count)

    def by_channel(self, value: Tensor) -> Tensor:
        """Return the mean squared error of each output channel."""
        batches = [self._residual(value, batch) for batch in range(len(self))]
        return torch.stack([each.square().mean(0) for each in batches]).mean(0)

    def _residual(self, value: Tensor, batch: int) -> Tensor:
        """Return output minus target, of shape (positions, channels)."""
        error = _exact(self._outputs([value], batch)[0]) - _exact(self._target[batch][0])
        module = self._unit.module
        if isinstance(module, nn.Linear):
            return error.reshape(-1, error.shape[-1])
        return error.movedim(-1 - _spatial(module), -1).reshape(-1, error.shape[-1 - _spatial(module)])

    def _columns(self, batch: int) -> Tensor:
        """Return what the weight is multiplied by, of shape (groups, positions, inputs of an output channel)."""
        module: Any = self._unit.module
        args, kwargs = self._inputs[batch]
        inputs = _exact(_floats((args, kwargs))[0])
        if isinstance(module, nn.Linear):
            return inputs.reshape(1, -1, inputs.shape[-1])
        shape = self._unit.weights[0].weight.shape
        size, groups = shape[1:].numel(), module.groups
        # A convolution with a kernel for each entry returns the patches, with any stride, dilation and padding.
        kernels = torch.eye(size, dtype=inputs.dtype, device=inputs.device).reshape(size, *shape[1:])
        with torch.autocast(inputs.device.type, enabled=False):
            patches = module._conv_forward(inputs, kernels.repeat(groups, *[1] * (len(shape) - 1)), None)
        patches = patches.movedim(-1 - _spatial(module), -1)
        return patches.reshape(-1, groups, size).transpose(0, 1)  # type: ignore[no-any-return]


def _floats(values: Any) -> list[Tensor]:
    """Return the floating-point tensors of arguments or outputs, without the classes of labels or units."""
    return [plain_tensor(tensor) for tensor in tensors_in(values) if tensor.is_floating_point()]


def _exact(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _spatial(module: Any) -> int:
    return len(module.kernel_size)
