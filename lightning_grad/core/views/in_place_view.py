"""Writing a derived weight into its parameter for the time of a step.

For modules that get at their parameters in ways of their own, and for parameters that several modules share. Everything else
is shown its weights by :func:`~lightning_grad.core.views.weight_view.attach_view`, where the protocol of a view stands too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakSet

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_grad.core.dispatch import wrap_method
from lightning_grad.core.views.weight_view import IN_PLACE, WeightView, own_parameter

_OPEN: WeakSet[InPlaceWindow] = WeakSet()


class _StoredInStateDict:
    """State-dict hook of an in-place view; a copy or pickle of the module gets one that does nothing."""

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

    Between :meth:`expose` and :meth:`restore` the parameter holds the view's value; at all other times, and so for
    optimizers, EMA and hooks, the dense weight. The gradient goes through the view's derivative by a tensor hook.

    Args:
        module: The module that owns the parameter.
        attribute: Name of the parameter in it.
        view: What to write.
        others: Other owners of the same, tied parameter, each with its attribute.
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
        self._sees_gradient = False

    @property
    def dense(self) -> Tensor:
        """The dense weight, wherever it is now."""
        return self.parameter.detach() if self._dense is None else self._dense

    def stored(self) -> Tensor:
        """Return what a checkpoint holds."""
        return self._view.stored(self.dense)

    def _through_view(self, gradient: Tensor) -> Tensor:
        """Apply the chain rule of the view, at the dense weight: a view may compute its mask from the value."""
        with torch.enable_grad():
            dense = self.dense.detach().requires_grad_()
            shown = self._view.value(dense)
            return gradient if shown is dense else torch.autograd.grad(shown, dense, gradient)[0]

    @torch.no_grad()
    def expose(self) -> None:
        """Write the view's value into the parameter, and keep the dense weight aside."""
        if self.parameter.requires_grad and not self._sees_gradient:
            self._sees_gradient = True
            self._handles.append(self.parameter.register_hook(self._through_view))  # type: ignore[no-untyped-call]
        if self._dense is None:
            self._dense = self.parameter.detach().clone()
            self._write(self._view.value(self._dense))

    @torch.no_grad()
    def restore(self) -> None:
        """Put the dense weight back, if it is out."""
        if self._dense is not None:
            self._write(self._dense)
            self._dense = None

    def _write(self, value: Tensor) -> None:
        # Through .data, which leaves the version counter alone: the dense weight itself has not changed.
        self.parameter.data.copy_(value)

    def detach(self) -> None:
        """Put the dense weight back and remove the hooks."""
        self.restore()
        self.parameter.__dict__.pop(IN_PLACE, None)
        for handle in self._handles:
            handle.remove()


def open_windows(pl_module: pl.LightningModule) -> list[InPlaceWindow]:
    """Return the windows that are open now."""
    return [window for window in _OPEN if window.pl_module is pl_module]


def close_windows(pl_module: pl.LightningModule, but: Sequence[InPlaceWindow] = ()) -> None:
    """Close what a ``training_step`` has opened that no backward follows, because it ran for inspection.

    Args:
        pl_module: The LightningModule.
        but: Windows that stay open, because they were before.
    """
    for window in open_windows(pl_module):
        if window not in but:
            window.close()


class InPlaceWindow:
    """Opens in-place views when a LightningModule's step begins, and closes them before anyone looks at the weights.

    The window opens around ``training_step`` and ``validation_step``. Under automatic optimization backward follows
    after ``training_step`` has returned, so the owner calls :meth:`close` in ``on_after_backward`` and in
    ``on_before_optimizer_step``; under manual optimization every optimizer step closes it, and the rest of
    ``training_step`` runs in a new one.

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
        """Open and close one more view from now on."""
        self._views.append(view)

    def discard(self, view: InPlaceView) -> None:
        """Detach a view, and no longer open it."""
        view.detach()
        self._views.remove(view)

    def open(self) -> None:
        """Write every view's value into its parameter."""
        _OPEN.add(self)
        for view in self._views:
            view.expose()

    def close(self) -> None:
        """Put the dense weights back."""
        _OPEN.discard(self)
        for view in self._views:
            view.restore()

    def reopen(self) -> None:
        """Go on with the rest of a manual ``training_step`` after one of its optimizers has stepped."""
        if self._in_training_step and self._manual:
            self.open()

    def remove(self) -> None:
        """Close the window for good."""
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
