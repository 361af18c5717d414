"""Layers that round their inputs, as they did in quantization-aware training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_grad.functional import fake_quantize_activation
from lightning_grad.functional.quantization.fake_quantization import ActivationQuantizer
from lightning_grad.utilities.parameters import clean_name
from lightning_grad.utilities.weight_axes import multiplies_by


class RoundedInput:
    """Forward pre-hook that rounds the first input of a layer.

    Args:
        bits: Bits of an activation.
        quantizer: Name of the grid.
        hadamard: With "quest": whether the grid is in the basis of a Hadamard transform.
    """

    def __init__(self, bits: int, quantizer: ActivationQuantizer = "affine", hadamard: bool = False) -> None:
        self.bits = bits
        self.quantizer: ActivationQuantizer = quantizer
        self.hadamard = hadamard
        self.is_on = True

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the inputs with the first one rounded."""
        x = args[0] if args else kwargs.get("input")
        if not self.is_on or not isinstance(x, Tensor) or not x.is_floating_point():
            return None
        rows = rows_of_input(layer, x)
        rounded = fake_quantize_activation(rows, self.bits, self.quantizer, self.hadamard).reshape(x.shape)
        return ((rounded, *args[1:]), kwargs) if args else (args, {**kwargs, "input": rounded})

    @property
    def format(self) -> dict[str, Any]:
        """The arguments, in types that a checkpoint may hold."""
        return {"bits": self.bits, "quantizer": self.quantizer, "hadamard": self.hadamard}


def rows_of_input(layer: nn.Module, x: Tensor) -> Tensor:
    """Return the input of a layer as rows with a grid each: a row for each token, or for each sample of a convolution."""
    if not isinstance(layer, _ConvNd):
        return x
    is_batched = x.ndim == len(layer.kernel_size) + 2
    return x.flatten(1) if is_batched else x.reshape(1, -1)


def why_input_stays(layer: nn.Module, attribute: str) -> str:
    """Return why the input of a layer cannot be rounded; empty if it can.

    Args:
        layer: The layer.
        attribute: Name of its weight.
    """
    if isinstance(layer, nn.MultiheadAttention):
        return "its queries, keys and values are projected without a layer of their own"
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        return "its attention never calls it, and reads its weight instead"
    if isinstance(layer, _ConvNd) or multiplies_by(layer, attribute):
        return ""
    return "it is no layer that multiplies its input by this weight"


def rounds_its_input(layer: nn.Module) -> bool:
    """Return True if a layer rounds its input already."""
    return any(isinstance(hook, RoundedInput) for hook in layer._forward_pre_hooks.values())


def apply_activation_quantization(module: nn.Module, formats: Mapping[str, Mapping[str, Any]]) -> Callable[[], None]:
    """Round the inputs of layers, so a module computes what quantization-aware training with activations validated.

    A checkpoint of such a training holds the weights only. Load it into the module, then call this function. The module
    can be copied and pickled; its ``state_dict`` stays as it is. Layers that round their input already keep that rounding.

    Args:
        module: The module that was trained, plain.
        formats: The layers by name, each with its bits, quantizer and basis:
            ``QuantizationAwareTraining.activation_formats``, or ``"activation_formats"`` in the callback's state of a
            checkpoint.

    Returns:
        Callable: Removes the rounding.

    Raises:
        ValueError: If the module has no layer of a name.

    Example:
        >>> import torch
        >>> layer = nn.Linear(3, 1, bias=False)
        >>> _ = nn.init.ones_(layer.weight)
        >>> undo = apply_activation_quantization(nn.ModuleDict({"a": layer}), {"a": {"bits": 1}})
        >>> layer(torch.tensor([0.0, 0.4, 1.0])).item()
        1.0
        >>> undo()
        >>> round(layer(torch.tensor([0.0, 0.4, 1.0])).item(), 1)
        1.4
    """
    layers = {clean_name(name): layer for name, layer in module.named_modules()}
    missing = [name for name in formats if name not in layers]
    if missing:
        raise ValueError(
            f"{type(module).__name__} has no layer {missing[0]!r}, whose input is to be rounded. Pass the module that was "
            "trained, or the same part of it with names that begin there."
        )
    handles = [
        layers[name].register_forward_pre_hook(RoundedInput(**form), with_kwargs=True)
        for name, form in formats.items()
        if not rounds_its_input(layers[name])
    ]

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo
