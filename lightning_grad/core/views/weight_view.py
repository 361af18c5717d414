"""Make a forward pass compute with a view of a weight instead of the trained weight.

A technique that derives weights (masks, noise, quantization) keeps the dense parameter where the
optimizer, DDP and EMA expect it, and gives the module a *view* of it. There are two ways:

- :func:`attach_view` replaces the module's class with a subclass in which the attribute is a
  property. Keys, order and identity of the parameters stay the same, ``torch.compile`` traces
  through it, and modules whose ``forward`` is never called (the output projection of
  ``MultiheadAttention``) work too.
- :class:`~lightning_grad.core.views.weight_view.InPlaceView` writes the derived weight into the
  parameter during forward and backward. It is for modules that access their parameters in other
  ways than by attribute, and for parameters that several modules share.

With both, ``state_dict`` holds the weight for inference, and all other code sees the dense weight.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol
from weakref import WeakSet

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_grad.core.dispatch import wrap_method
from lightning_grad.functional.gradients.shards import reshard
from lightning_grad.functional.gradients.tensor_lists import is_sharded

_VIEWS = "_lightning_grad_views"
_DENSE = "_lightning_grad_dense"
IN_PLACE = "_lightning_grad_in_place"
ADAPTERS = "_lightning_grad_adapters"  # of a layer, by the weight; see adapted_layer.py
# Suffixes of the parameters by which torch's prune, spectral_norm and weight_norm replace a weight.
REPLACEMENTS = ("orig", "g", "v")


class WeightView(Protocol):
    """The view of one parameter."""

    def value(self, dense: Tensor) -> Tensor:
        """Return the weight for the forward pass, differentiable with respect to ``dense``."""

    def stored(self, dense: Tensor) -> Tensor:
        """Return the weight for checkpoints and inference: a new tensor without gradient, or ``dense`` itself."""


class _Parameters:
    """The parameters of a viewed module, to restore those that other code removed before it was refused."""

    def __init__(self, module: nn.Module) -> None:
        self._all = dict(module._parameters)

    def put_back(self, module: nn.Module) -> None:
        present = dict(module._parameters)
        module._parameters.clear()  # to restore the old order, by which optimizers store their state
        module._parameters.update({**self._all, **present})


def own_parameter(module: nn.Module, attribute: str) -> nn.Parameter:
    """Return the parameter itself, even if the attribute returns a view of it."""
    parameter = module._parameters[attribute]
    assert parameter is not None
    return parameter


def _refusals(base: type[nn.Module], attributes: frozenset[str]) -> dict[str, Any]:
    """Return methods that raise if pruning, a norm or a parametrization would replace a viewed weight."""

    def refuse(self: nn.Module, name: str) -> None:
        """Raise a clear error instead of the obscure ones that two owners of a weight cause."""
        self.__dict__[_DENSE].put_back(self)
        known = getattr(self.__dict__[_VIEWS].get(name), "name", f"{base.__name__}.{name}")
        raise RuntimeError(
            f"{known} cannot be reparametrized while a technique shows it through a view: pruning, weight_norm, "
            "spectral_norm and parametrize would replace it. Exclude the layer with the technique's exclude=, or "
            "reparametrize it before the fit; the technique then skips it."
        )

    def delete(self: nn.Module, name: str) -> None:
        if name in attributes:
            refuse(self, name)
        base.__delattr__(self, name)

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        owner = next((attribute for attribute in attributes if name.startswith(f"{attribute}_")), None)
        # Only parameters that replace the weight are refused: an adapter may be added to the layer.
        if owner is not None and name.removeprefix(f"{owner}_") in REPLACEMENTS:
            refuse(self, owner)
        base.register_parameter(self, name, param)

    return {"__delattr__": delete, "register_parameter": register}


@functools.cache
def _viewing_class(base: type[nn.Module], attributes: frozenset[str]) -> type[nn.Module]:
    """Derive a class whose ``attributes`` are properties that return the views."""

    def save(self: nn.Module, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        base._save_to_state_dict(self, destination, prefix, keep_vars)
        for name, view in self.__dict__[_VIEWS].items():
            destination[prefix + name] = view.stored(own_parameter(self, name).detach())

    def reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
        """Pickle and copy as a plain module that computes the same outputs."""
        state = {key: value for key, value in self.__dict__.items() if key not in (_VIEWS, _DENSE)}
        state["_parameters"] = dict(self._parameters)
        for name, view in self.__dict__[_VIEWS].items():
            dense = own_parameter(self, name)
            stored = view.stored(dense.detach()).clone()
            state["_parameters"][name] = nn.Parameter(stored, requires_grad=dense.requires_grad)
        # Not copyreg.__newobj__: pickle accepts it only for the object's own class.
        return object.__new__, (base,), state

    def shown(name: str) -> property:
        def value(self: nn.Module) -> Tensor:
            try:
                return self.__dict__[_VIEWS][name].value(self._parameters[name])  # type: ignore[no-any-return]
            except AttributeError as error:  # torch would return the parameter, as if there were no view
                raise RuntimeError(f"The view of {base.__name__}.{name} failed: {error}") from error

        return property(value)

    members: dict[str, Any] = {name: shown(name) for name in attributes}
    members |= {"_save_to_state_dict": save, "__reduce_ex__": reduce, "_viewed_class": base}
    members |= _refusals(base, attributes)
    members |= {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (base,), members)


def viewed_class(module: nn.Module) -> type[nn.Module]:
    """Return the module's original class, whether or not it has a view now."""
    return getattr(type(module), "_viewed_class", type(module))


def has_view(module: nn.Module, attribute: str) -> bool:
    """Return True if a technique already shows this parameter through a view or has an adapter for it."""
    parameter = module._parameters[attribute]
    # A copy of a parameter carries the mark but not the view; its identity differs from the marked
    # one.
    is_shown = attribute in module.__dict__.get(_VIEWS, {}) or attribute in module.__dict__.get(ADAPTERS, {})
    return is_shown or getattr(parameter, IN_PLACE, None) == id(parameter)


def attach_view(module: nn.Module, attribute: str, view: WeightView) -> Callable[[], None]:
    """Show a module's parameter through a view.

    Args:
        module: Module that owns the parameter.
        attribute: Name of the parameter in it.
        view: The view.

    Returns:
        Callable: Removes the view and restores the module's class; may be called more than once.

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


_OPEN: WeakSet[InPlaceWindow] = WeakSet()


class _StoredInStateDict:
    """State-dict hook of an in-place view. In a copy or pickle of the module it does nothing."""

    def __init__(self, attribute: str, view: InPlaceView | None) -> None:
        self._attribute = attribute
        self._view = view

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
        if self._view is not None:
            state_dict[prefix + self._attribute] = self._view.stored()

    def __reduce__(self) -> tuple[Any, ...]:
        return _StoredInStateDict, (self._attribute, None)


class InPlaceView:
    """Writes the derived weight into the parameter while a step computes with it.

    Between :meth:`expose` and :meth:`restore` the parameter holds the view's value. At all other
    times, and so for optimizers, EMA and hooks, it holds the dense weight. A tensor hook multiplies
    the gradient by the view's derivative.

    Args:
        module: Module that owns the parameter.
        attribute: Name of the parameter in it.
        view: The view.
        others: Other owners of the same (tied) parameter, each with its attribute.
    """

    def __init__(
        self, module: nn.Module, attribute: str, view: WeightView, others: Sequence[tuple[nn.Module, str]] = ()
    ) -> None:
        self.parameter = own_parameter(module, attribute)
        self._view = view
        self._dense: Tensor | None = None
        self._handles = [
            owner.register_state_dict_post_hook(_StoredInStateDict(name, self))  # type: ignore[no-untyped-call]
            for owner, name in [(module, attribute), *others]
        ]
        setattr(self.parameter, IN_PLACE, id(self.parameter))
        self.parameter.__deepcopy__ = self._copied  # type: ignore[method-assign]
        self.parameter.__reduce_ex__ = self._reduced  # type: ignore[method-assign]
        self._sees_gradient = False

    @property
    def dense(self) -> Tensor:
        """The dense weight, whether or not the parameter holds it now."""
        return self.parameter.detach() if self._dense is None else self._dense

    def stored(self) -> Tensor:
        """Return the weight for a checkpoint."""
        return self._view.stored(self.dense)

    def _reduced(self, protocol: int = 2) -> tuple[Any, ...]:
        """Pickle the parameter as a plain one with which a module computes the same outputs."""
        return nn.Parameter, (self.stored().clone(), self.parameter.requires_grad)

    def _copied(self, memo: dict[int, Any]) -> nn.Parameter:
        create, arguments = self._reduced()
        return memo.setdefault(id(self.parameter), create(*arguments))  # type: ignore[no-any-return]

    def _through_view(self, gradient: Tensor) -> Tensor:
        """Apply the chain rule at the dense weight, because a view may compute its mask from the value."""
        with torch.enable_grad():
            dense = self.dense.detach().requires_grad_()
            shown = self._view.value(dense)
            return gradient if shown is dense else torch.autograd.grad(shown, dense, gradient)[0]

    @torch.no_grad()
    def expose(self) -> None:
        """Write the view's value into the parameter, and save the dense weight."""
        if self.parameter.requires_grad and not self._sees_gradient:
            self._sees_gradient = True
            self._handles.append(self.parameter.register_hook(self._through_view))  # type: ignore[no-untyped-call]
        if self._dense is None:
            self._dense = self.parameter.detach().clone()
            self._write(self._view.value(self._dense))

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the dense weight, if the view's value replaced it."""
        if self._dense is not None:
            self._write(self._dense)
            self._dense = None

    def _write(self, value: Tensor) -> None:
        # Through .data, which does not change the version counter: the dense weight itself has not
        # changed.
        self.parameter.data.copy_(value)

    def detach(self) -> None:
        """Restore the dense weight and remove the hooks."""
        self.restore()
        for name in (IN_PLACE, "__deepcopy__", "__reduce_ex__"):
            self.parameter.__dict__.pop(name, None)
        for handle in self._handles:
            handle.remove()


def open_windows(pl_module: pl.LightningModule) -> list[InPlaceWindow]:
    """Return the windows that are open now."""
    return [window for window in _OPEN if window.pl_module is pl_module]


def close_windows(pl_module: pl.LightningModule, but: Sequence[InPlaceWindow] = ()) -> None:
    """Close the windows that a ``training_step`` without a backward pass left open.

    Args:
        pl_module: The LightningModule.
        but: Windows to keep open, because they were open before.
    """
    for window in open_windows(pl_module):
        if window not in but:
            window.close()


class InPlaceWindow:
    """Opens in-place views when a LightningModule's step begins, and closes them before other code reads the weights.

    The window opens around ``training_step`` and ``validation_step``. Under automatic optimization,
    backward runs after ``training_step`` has returned, so the owner calls :meth:`close` in
    ``on_after_backward`` and ``on_before_optimizer_step``. Under manual optimization, every
    optimizer step closes the window and opens it again for the rest of ``training_step``.

    Args:
        pl_module: The LightningModule.
        views: Its in-place views.
    """

    def __init__(self, pl_module: pl.LightningModule, views: Sequence[InPlaceView]) -> None:
        self._views = list(views)
        self._manual = not pl_module.automatic_optimization
        self._in_training_step = False
        self.pl_module = pl_module
        self._undo = [
            wrap_method(pl_module, "training_step", self._around_training),
            wrap_method(pl_module, "validation_step", self._around_validation),
        ]

    def add(self, view: InPlaceView) -> None:
        """Add a view to the window."""
        self._views.append(view)

    def discard(self, view: InPlaceView) -> None:
        """Detach a view and remove it from the window."""
        view.detach()
        self._views.remove(view)

    def open(self) -> None:
        """Write every view's value into its parameter."""
        _OPEN.add(self)
        if any(is_sharded(view.parameter) for view in self._views):
            reshard(self.pl_module)  # layers that hold whole weights since a validation would not see what is written
        for view in self._views:
            view.expose()

    def close(self) -> None:
        """Restore the dense weights."""
        _OPEN.discard(self)
        for view in self._views:
            view.restore()

    def reopen(self) -> None:
        """Open the window again for the rest of a manual ``training_step``, after an optimizer step in it."""
        if self._in_training_step and self._manual:
            self.open()

    def remove(self) -> None:
        """Detach all views and unwrap the module's steps."""
        for undo in self._undo:
            undo()
        for view in self._views:
            view.detach()

    def _around_training(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.open()
        self._in_training_step = True
        try:
            return inner(*args, **kwargs)
        finally:
            self._in_training_step = False
            if self._manual:
                self.close()

    def _around_validation(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.open()
        try:
            return inner(*args, **kwargs)
        finally:
            self.close()
