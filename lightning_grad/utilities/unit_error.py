"""The error of a layer's output when its weights are rounded, from recorded calls of the layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_grad.functional import QuantizedTensor, SoftRounding, flip_roundings
from lightning_grad.functional.plain_tensors import plain_tensor
from lightning_grad.utilities.batch_copies import copy_of
from lightning_grad.utilities.batches import tensors_in
from lightning_grad.utilities.rounding_units import Run, Unit, hooks


@dataclass
class Calls:
    """Calls of a module: arguments and outputs."""

    inputs: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    outputs: list[list[Tensor]] = field(default_factory=list)

    @property
    def shapes(self) -> list[list[torch.Size]]:
        """Shapes of the arguments."""
        return [[tensor.shape for tensor in tensors_in(each)] for each in self.inputs]


def record_calls(module: nn.Module, runs: Sequence[Run]) -> Calls:
    """Run the network, and record the calls of a module. Copies, because later layers may change tensors in place."""
    calls = Calls()

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.inputs.append(copy_of((args, kwargs)))

    def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.outputs.append([tensor.detach().clone() for tensor in _floats(output)])

    pre = module.register_forward_pre_hook(before, with_kwargs=True)
    post = module.register_forward_hook(after, with_kwargs=True)
    with hooks((pre, post)):
        for run in runs:
            run()
    return calls


class UnitError:
    """The mean squared error of a unit's output, for given values of its weights.

    Args:
        unit: The unit.
        target: Its calls in the network as it was; their outputs are the target.
        calls: Its calls whose inputs it gets.
    """

    def __init__(self, unit: Unit, target: Calls, calls: Calls) -> None:
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
        residuals = torch.cat([self._residual(value, batch) for batch in range(len(self))])
        return residuals.square().mean(0)

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
