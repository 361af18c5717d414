"""Showing the forward pass another weight than the one that is trained.

A technique that derives weights (masks, noise, quantization) keeps the dense parameter where the optimizer, DDP and EMA
expect it, and gives the module a *view* of it. Two ways in:

- :func:`attach_view` swaps the module's class for a subclass in which the attribute is a property. Keys, order and
  identity of the parameters stay, ``torch.compile`` traces through, and modules whose ``forward`` is never called
  (the output projection of ``MultiheadAttention``) work too.
- :class:`~lightning_grad.core.views.in_place_view.InPlaceView` writes the derived weight into the parameter for the time of
  forward and backward. It serves modules that get at their parameters in ways of their own, and parameters that several
  modules share.

With both, ``state_dict`` holds the weight that inference uses, and everyone else sees the dense one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

_VIEWS = "_lightning_grad_views"
_DENSE = "_lightning_grad_dense"
IN_PLACE = "_lightning_grad_in_place"
REPLACEMENTS = ("orig", "g", "v")  # under which torch's prune, spectral_norm and weight_norm keep a weight


class WeightView(Protocol):
    """How one parameter is seen."""

    def value(self, dense: Tensor) -> Tensor:
        """Return what the forward pass uses, differentiable in ``dense``."""

    def stored(self, dense: Tensor) -> Tensor:
        """Return what a checkpoint holds and inference uses: a new tensor without gradient, or ``dense`` itself."""


class _Parameters:
    """The parameters of a viewed module, to put back what other code took out before it was refused."""

    def __init__(self, module: nn.Module) -> None:
        self._all = dict(module._parameters)

    def put_back(self, module: nn.Module) -> None:
        present = dict(module._parameters)
        module._parameters.clear()  # in the old order, by which optimizers store their state
        module._parameters.update({**self._all, **present})


def own_parameter(module: nn.Module, attribute: str) -> nn.Parameter:
    """Return the parameter itself, also where the attribute shows a view of it."""
    parameter = module._parameters[attribute]
    assert parameter is not None
    return parameter


def _refusals(base: type[nn.Module], attributes: frozenset[str]) -> dict[str, Any]:
    """Return methods that refuse to let pruning and the like take the place of a viewed weight."""

    def refuse(self: nn.Module, name: str) -> None:
        """Raise in place of the foreign errors in which a second owner of the weight ends."""
        self.__dict__[_DENSE].put_back(self)
        known = getattr(self.__dict__[_VIEWS].get(name), "name", f"{base.__name__}.{name}")
        raise RuntimeError(
            f"{known} cannot be reparametrized while a technique shows it through a view: pruning, weight_norm, "
            "spectral_norm and parametrize would take its place. Leave the layer out by the technique's exclude=, or do that "
            "before the fit, and the technique leaves it out itself."
        )

    def delete(self: nn.Module, name: str) -> None:
        if name in attributes:
            refuse(self, name)
        base.__delattr__(self, name)

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        owner = next((attribute for attribute in attributes if name.startswith(f"{attribute}_")), None)
        # Only what takes the place of a weight: an adapter may be added to the layer.
        if owner is not None and name.removeprefix(f"{owner}_") in REPLACEMENTS:
            refuse(self, owner)
        base.register_parameter(self, name, param)

    return {"__delattr__": delete, "register_parameter": register}


@functools.cache
def _viewing_class(base: type[nn.Module], attributes: frozenset[str]) -> type[nn.Module]:
    """Derive the class whose instances show ``attributes`` through their views."""

    def save(self: nn.Module, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        base._save_to_state_dict(self, destination, prefix, keep_vars)
        for name, view in self.__dict__[_VIEWS].items():
            destination[prefix + name] = view.stored(own_parameter(self, name).detach())

    def reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
        """Pickle and copy as a plain module that computes the same."""
        state = {key: value for key, value in self.__dict__.items() if key not in (_VIEWS, _DENSE)}
        state["_parameters"] = dict(self._parameters)
        for name, view in self.__dict__[_VIEWS].items():
            dense = own_parameter(self, name)
            stored = view.stored(dense.detach()).clone()
            state["_parameters"][name] = nn.Parameter(stored, requires_grad=dense.requires_grad)
        # Not copyreg.__newobj__: pickle refuses it for another class than the object's own.
        return object.__new__, (base,), state

    def shown(name: str) -> property:
        return property(lambda self: self.__dict__[_VIEWS][name].value(self._parameters[name]))

    members: dict[str, Any] = {name: shown(name) for name in attributes}
    members |= {"_save_to_state_dict": save, "__reduce_ex__": reduce, "_viewed_class": base}
    members |= _refusals(base, attributes)
    members |= {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (base,), members)


def viewed_class(module: nn.Module) -> type[nn.Module]:
    """Return the class the user gave the module, whether or not it is viewed now."""
    return getattr(type(module), "_viewed_class", type(module))


def has_view(module: nn.Module, attribute: str) -> bool:
    """Return whether a technique already shows this parameter through a view."""
    parameter = module._parameters[attribute]
    # A pickled copy of a parameter carries the mark with it, but not the view; its identity is another.
    return attribute in module.__dict__.get(_VIEWS, {}) or getattr(parameter, IN_PLACE, None) == id(parameter)


def attach_view(module: nn.Module, attribute: str, view: WeightView) -> Callable[[], None]:
    """Show a module's parameter through a view.

    Args:
        module: The module that owns the parameter.
        attribute: Name of the parameter in it.
        view: What to show.

    Returns:
        Callable: Gives the module its own class back; may be called more than once.

    Example:
        >>> import torch
        >>> class Doubled:
        ...     def value(self, dense):
        ...         return 2 * dense
        ...     stored = value
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.ones_(layer.weight)
        >>> undo = attach_view(layer, "weight", Doubled())
        >>> layer(torch.ones(1)).item(), next(layer.parameters()).item(), layer.state_dict()["weight"].item()
        (2.0, 1.0, 2.0)
        >>> undo()
        >>> type(layer) is nn.Linear, layer(torch.ones(1)).item()
        (True, 1.0)
    """
    views = module.__dict__.setdefault(_VIEWS, {})
    views[attribute] = view
    module.__dict__.setdefault(_DENSE, _Parameters(module))
    base = viewed_class(module)
    module.__class__ = _viewing_class(base, frozenset(views))  # type: ignore[arg-type]

    def undo() -> None:
        if views.pop(attribute, None) is not None:
            module.__class__ = _viewing_class(base, frozenset(views)) if views else base  # type: ignore[arg-type]
        if not views and module.__dict__.get(_VIEWS) is views:
            del module.__dict__[_VIEWS], module.__dict__[_DENSE]

    return undo
