"""Parameters of a technique next to the frozen weight of a layer, as in LoRA.

The layer's class is replaced by a subclass. In training, it computes with the frozen weight and the
parameters of an :class:`Adapter`; in validation, with the merged weight. ``state_dict`` holds the
merged weight under the plain key and not the adapter's parameters, so keys stay the same. The
parameters are registered on the layer, so ``parameters()``, devices, precision and DDP include them.

In contrast to a view (``weight_view.py``), the optimizer does not train the weight itself. A weight
has a view or an adapter, never both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_grad.core.views.weight_choice import FoundWeight
from lightning_grad.core.views.weight_view import ADAPTERS
from lightning_grad.utilities.adapters import digest_of

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONVOLVE = (F.conv1d, F.conv2d, F.conv3d)


class Adapter:
    """The parameters of a technique for one weight: derive from it and define ``start`` and ``merged``.

    Class attributes:

    - ``keeps_weight``: whether :meth:`merged` reads the frozen weight. If not, its memory is free until
      the end of the fit.

    Args:
        found: The weight.
    """

    keeps_weight: ClassVar[bool] = True

    def __init__(self, found: FoundWeight) -> None:
        self.found = found
        self.name = found.name
        self.layer = found.module
        self.shape = found.parameter.shape
        self.own: dict[str, nn.Parameter] = {}
        self._keys: dict[str, str] = {}
        self._is_attached = False
        self._shows_frozen = False
        self._inference: Tensor | None = None
        self.digest = ""  # of the weight that the adapter started from, if it is kept

    def start(self) -> Mapping[str, Tensor]:
        """Return the initial values of the adapter's parameters by name, on the device of the weight."""
        raise NotImplementedError(f"{type(self).__name__} must define start().")

    def merged(self, weight: Tensor) -> Tensor:
        """Return the weight with the adapter, differentiable with respect to the adapter's parameters.

        Args:
            weight: The frozen weight. With ``keeps_weight = False`` it is empty.
        """
        raise NotImplementedError(f"{type(self).__name__} must define merged(weight).")

    def output(self, x: Tensor, frozen: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the output of the layer in training, if that needs less than the merged weight.

        Override it for layers for which :attr:`multiplies` or :attr:`convolves` is true. All others, and
        those of adapters without this method, compute with the merged weight.

        Args:
            x: Input of the layer.
            frozen: Computes the output with the frozen weight.
        """
        raise NotImplementedError(f"{type(self).__name__} must define output(x, frozen).")

    def two_products(self, x: Tensor, first: Tensor, second: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the output of the layer with the weight ``second @ first``, without computing this product.

        Args:
            x: Input of the layer.
            first: Matrix of shape (r, in), or (r, in * ...) for a kernel.
            second: Matrix of shape (out, r).
            bias: Bias of the layer.
        """
        if not self.convolves:
            return F.linear(F.linear(x, first), second, bias)
        layer: Any = self.layer
        small = layer._conv_forward(x, first.view(-1, *self.shape[1:]), None)
        ones = [1] * (len(self.shape) - 2)
        return _CONVOLVE[len(ones) - 1](small, second.view(*second.shape, *ones), bias)

    @property
    def frozen(self) -> nn.Parameter:
        """The frozen weight."""
        return self.found.parameter

    @property
    def is_attached(self) -> bool:
        """Whether the layer has this adapter now."""
        return self._is_attached

    @functools.cached_property
    def multiplies(self) -> bool:
        """Whether the layer's output is the input times the weight plus a bias: ``nn.Linear``, and ``Conv1D`` of GPT-2."""
        kind = plain_class(self.layer)
        if self.found.attribute != "weight" or "forward" in self.layer.__dict__:
            return False
        # By name, because importing transformers takes seconds.
        is_gpt2 = kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"
        return is_gpt2 or (kind.forward is nn.Linear.forward and not _is_read_by_parent(self.layer))

    @functools.cached_property
    def is_transposed(self) -> bool:
        """Whether the weight is (in, out) in place of (out, in)."""
        return self.found.output_dimension() == 1

    @functools.cached_property
    def convolves(self) -> bool:
        """Whether the layer is a convolution of torch."""
        is_plain = any(plain_class(self.layer).forward is kind.forward for kind in _CONVOLUTIONS)
        return is_plain and self.found.attribute == "weight" and "forward" not in self.layer.__dict__

    @property
    def has_output(self) -> bool:
        """Whether :meth:`output` computes the layer in training."""
        return type(self).output is not Adapter.output and (self.multiplies or self.convolves)

    # The life of an adapter.

    def attach(self) -> None:
        """Register the parameters on the layer and replace its class."""
        values = self.start()
        self.digest = self._digest()
        self._keys = {name: f"{self.found.attribute}_{name}" for name in values}
        self.own = {name: nn.Parameter(value.contiguous()) for name, value in values.items()}
        for name, parameter in self.own.items():
            self.layer.register_parameter(self._keys[name], parameter)
        self.layer.__dict__.setdefault(ADAPTERS, {})[self.found.attribute] = self
        self.frozen.requires_grad_(False)
        self._is_attached = True
        _set_class(self.layer)
        self.free()

    @torch.no_grad()
    def detach(self) -> None:
        """Write the merged weight into the layer, remove the parameters and restore the class."""
        if not self._is_attached:
            return
        self.leave_inference()
        frozen, value = self.frozen, self.merged(self.frozen)
        for name, key in self._keys.items():
            self.own[name] = self.layer._parameters.pop(key)  # type: ignore[assignment]
        self._is_attached = False
        self.layer.__dict__[ADAPTERS].pop(self.found.attribute)
        _set_class(self.layer)
        if self.keeps_weight:
            frozen.copy_(value)
        else:
            frozen.data = value

    def _digest(self) -> str:
        return digest_of(self.frozen) if self.keeps_weight else ""  # without the weight, nothing is added to it later

    def value(self, dense: Tensor) -> Tensor:
        """Return the merged weight with its graph."""
        return self.merged(dense)

    def stored(self, dense: Tensor) -> Tensor:
        """Return the merged weight for a checkpoint, without gradient."""
        with torch.no_grad():
            return self.merged(dense)

    def enter_inference(self) -> None:
        """Compute with the merged weight from now on."""
        if self._inference is None:
            self._inference = self.stored(self.frozen.detach())

    def leave_inference(self) -> None:
        """Compute with the frozen weight and the adapter again."""
        self._inference = None

    def weight(self) -> Tensor:
        """Return what the layer's attribute shows: the merged weight, except inside :meth:`output`."""
        if self._inference is not None:
            return self._inference
        return self.frozen if self._shows_frozen else self.merged(self.frozen)

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the adapter's parameters, and the digest of the kept weight that it started from."""
        return {"digest": self.digest, **{name: value.detach().clone() for name, value in self.own.items()}}

    def allocate(self) -> None:
        """Allocate the frozen weight again, so weights can be loaded into it."""
        if not self.keeps_weight:
            self.frozen.data = self.frozen.new_empty(self.shape)

    def free(self) -> None:
        """Free the frozen weight if it is not kept."""
        if not self.keeps_weight:
            self.frozen.data = self.frozen.new_empty(0)

    @torch.no_grad()
    def start_again(self) -> None:
        """Start from a weight that was loaded during the fit, so the layer computes with what was loaded.

        When a run resumes, the adapter's own state is loaded afterwards.
        """
        for name, value in self.start().items():
            self.own[name].copy_(value)
        self.digest = self._digest()
        if self._inference is not None:
            self._inference = self.stored(self.frozen.detach())

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved state."""
        self.digest = state["digest"]
        for name, parameter in self.own.items():
            parameter.copy_(state[name])

    # What the layer's class calls.

    def forward(self, base: type[nn.Module], x: Tensor) -> Tensor:
        """Compute the output of the layer."""
        if self._inference is not None:
            return base.forward(self.layer, x)  # type: ignore[no-any-return]
        return self.output(x, functools.partial(self._with_frozen, base))

    def _with_frozen(self, base: type[nn.Module], x: Tensor) -> Tensor:
        layer: Any = self.layer
        if base.forward is nn.Linear.forward:
            return F.linear(x, self.frozen, layer.bias)
        if self.convolves:
            return layer._conv_forward(x, self.frozen, layer.bias)  # type: ignore[no-any-return]
        self._shows_frozen = True
        try:
            return base.forward(layer, x)  # type: ignore[no-any-return]
        finally:
            self._shows_frozen = False

    def saved(self, destination: dict[str, Any], prefix: str) -> None:
        """Put the merged weight into a state dict in place of the frozen one and the adapter's parameters."""
        for key in self._keys.values():
            destination.pop(prefix + key, None)
        destination[prefix + self.found.attribute] = self.stored(self.frozen.detach())

    def own_keys(self, prefix: str) -> set[str]:
        """Return the names of the adapter's parameters."""
        return {prefix + key for key in self._keys.values()}


def plain_class(layer: nn.Module) -> type[nn.Module]:
    """Return the class of a layer without adapters."""
    return getattr(type(layer), "_adapted_class", type(layer))


def adapters_of(module: nn.Module) -> Iterator[Adapter]:
    """Yield all adapters in a module."""
    for layer in module.modules():
        yield from layer.__dict__.get(ADAPTERS, {}).values()


def _is_read_by_parent(layer: nn.Module) -> bool:
    # The output projection of MultiheadAttention, whose forward is never called.
    return isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear)


def _set_class(layer: nn.Module) -> None:
    base, adapters = plain_class(layer), layer.__dict__[ADAPTERS]
    if adapters:
        calls = any(each.has_output for each in adapters.values())
        layer.__class__ = _adapted_class(base, frozenset(adapters), calls)  # type: ignore[arg-type]
    else:
        layer.__class__ = base
        del layer.__dict__[ADAPTERS]


@functools.cache
def _adapted_class(base: type[nn.Module], attributes: frozenset[str], calls: bool) -> type[nn.Module]:
    """Derive a class whose ``attributes`` show merged weights.

    Args:
        base: Class of the layer.
        attributes: Names of the weights with adapters.
        calls: Whether an adapter computes the output of the layer.
    """

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        (x,) = (*args, *kwargs.values())
        return self.__dict__[ADAPTERS]["weight"].forward(base, x)  # type: ignore[no-any-return]

    def save(self: nn.Module, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        base._save_to_state_dict(self, destination, prefix, keep_vars)
        for adapter in self.__dict__[ADAPTERS].values():
            adapter.saved(destination, prefix)

    def load(
        self: nn.Module, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing: list[str], *rest: Any
    ) -> None:
        own: set[str] = set().union(*(adapter.own_keys(prefix) for adapter in self.__dict__[ADAPTERS].values()))
        found: list[str] = []
        for adapter in self.__dict__[ADAPTERS].values():
            adapter.allocate()
        base._load_from_state_dict(self, state_dict, prefix, local_metadata, strict, found, *rest)
        for name, adapter in self.__dict__[ADAPTERS].items():
            if getattr(state_dict.get(prefix + name), "shape", None) == adapter.shape:
                adapter.start_again()
            adapter.free()
        missing += [key for key in found if key not in own]

    def reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
        """Pickle and copy as a plain module that computes the same outputs."""
        state = {key: value for key, value in self.__dict__.items() if key != ADAPTERS}
        state["_parameters"] = dict(self._parameters)
        for name, adapter in self.__dict__[ADAPTERS].items():
            state["_parameters"][name] = nn.Parameter(adapter.stored(adapter.frozen.detach()), requires_grad=False)
            for key in adapter.own_keys(""):
                del state["_parameters"][key]
        # Not copyreg.__newobj__: pickle accepts it only for the object's own class.
        return object.__new__, (base,), state

    def shown(name: str) -> property:
        def value(self: nn.Module) -> Tensor:
            try:
                return self.__dict__[ADAPTERS][name].weight()  # type: ignore[no-any-return]
            except AttributeError as error:  # torch would return the frozen weight, as if there were no adapter
                raise RuntimeError(f"The adapter of {base.__name__}.{name} failed: {error}") from error

        return property(value)

    members: dict[str, Any] = {name: shown(name) for name in attributes}
    members |= {"_save_to_state_dict": save, "_load_from_state_dict": load, "__reduce_ex__": reduce}
    members |= {"forward": forward} if calls else {}
    members |= {"_adapted_class": base, "__module__": base.__module__}
    members |= {"__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (base,), members)
