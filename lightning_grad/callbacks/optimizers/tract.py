"""TrAct: the callback. The rule is :func:`lightning_grad.functional.train_activations`."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from typing_extensions import override

from lightning_grad.callbacks.optimizers.zeroth_order import ZerothOrder
from lightning_grad.core import (
    WHOLE_WEIGHTS,
    Chosen,
    Compatibility,
    GradCallback,
    UndoList,
    attach_view,
    check_above,
    during_fit,
    is_quiet,
    yes,
)
from lightning_grad.core.views.weight_view import has_view
from lightning_grad.functional import train_activations
from lightning_grad.functional.choices import hint_for
from lightning_grad.functional.plain_tensors import plain_tensor
from lightning_grad.utilities.checks import check_finite
from lightning_grad.utilities.forward_order import is_compiled
from lightning_grad.utilities.parameters import clean_name
from lightning_grad.utilities.reporting import listed

_SOUGHT = "Linear or convolution that trains and is not in a compiled module"
_WAY_OUT = "Compile only the layers after the first one, set layer=..., or drop the callback"
_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_OTHERS = (nn.Embedding, nn.EmbeddingBag, nn.MultiheadAttention, nn.RNNBase, nn.Bilinear)  # have weights and inputs too


class TrAct(GradCallback):
    r"""Train the first layer in the steepest direction of its activations instead of its weights.

    .. math::
        G \leftarrow \frac{\partial L}{\partial Z}^{\!\top} X \, \Bigl(\frac{X^\top X}{b} + \lambda I\Bigr)^{-1}

    X are the inputs of the layer (b rows, one for each sample and position), Z its outputs. The plain
    gradient of a first layer grows with the contrast and brightness of its inputs; this one does not.
    Only the gradient of this one weight changes.

    Args:
        damping: lambda, above 0 (0.1 in the released code).
        layer: Name of the layer. Default: the first Linear or convolution that trains, in the order
            of the first batch.
        name: Name of this instance, needed if two are used.

    Raises:
        ValueError: In the constructor if damping is not above 0 or not finite. Before the first batch
            if no layer has this name, or the layer is not a Linear or convolution, is frozen, is
            compiled, or computes its weight from another tensor; if no layer is left to find; with
            ZerothOrder, FSDP or DeepSpeed.
        RuntimeError: After the first batch that ran backward if it reached no such layer.

    **Hooks.** Forward hooks of the layer. The gradient is changed inside of backward, for each call of
    the layer by its own inputs, before it is accumulated and before DDP reduces it.

    **Logs.** None.

    **State.** None.

    **Cost.** For each call of the layer, a product of its inputs with themselves and the solution of
    one system of equations, as large as the layer's inputs or the number of rows, whichever is less.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.TrAct
                  init_args:
                    damping: 0.1

    References:
        Petersen et al., "TrAct: Making First-layer Pre-Activations Trainable", NeurIPS 2024, arXiv
        2410.23970.
    """

    namespace: ClassVar[str] = "tract"
    compatibility: ClassVar[Compatibility] = GradCallback.compatibility.but(
        compiled=yes("Layers inside of compiled modules are skipped."),
        **WHOLE_WEIGHTS,
    )
    trial: ClassVar[Mapping[str, Any]] = {"damping": 0.2}
    neutral: ClassVar[Mapping[str, Any] | str] = "no damping leaves the gradient of the layer as it is"

    _found = during_fit[str | None](lambda _: None)
    _ran_backward = during_fit[bool](lambda _: False)
    _before = during_fit.of(list[str])  # layers of other kinds that the batch reached before

    def __init__(self, damping: float = 0.1, layer: str | None = None, name: str | None = None) -> None:
        super().__init__(name)
        self.damping = check_finite(check_above(damping, 0.0, "damping"), "damping")
        self.layer = layer

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, ZerothOrder):
                raise ValueError(
                    f"{self.display_name} changes a gradient in the backward pass, but {other.display_name} runs none. "
                    "Keep one of them."
                )
        named = {clean_name(name): module for name, module in pl_module.named_modules()}
        if self.layer is None:
            self._search(pl_module, named)
        elif self.layer in named:
            self._attach(pl_module, self.layer, named[self.layer])
            self.announce(f"trains the activations of {self.layer}", "layers", [self.layer])
        else:
            layers = [name for name, module in named.items() if isinstance(module, _KINDS)]
            raise ValueError(f"{self.display_name}: no layer is named {self.layer!r}.{hint_for(self.layer, layers)}")

    def _search(self, pl_module: pl.LightningModule, named: Mapping[str, nn.Module]) -> None:
        """Find the layer that the first batch reaches first, by hooks that this batch removes."""
        compiled = _in_compiled_modules(pl_module)
        layers = [
            (name, m) for name, m in named.items() if isinstance(m, (*_KINDS, *_OTHERS)) and id(m) not in compiled
        ]
        if not any(isinstance(layer, _KINDS) and layer.weight.requires_grad for _, layer in layers):
            raise ValueError(f"{self.display_name} finds no {_SOUGHT}. {_WAY_OUT}.")
        search = UndoList()
        self.undo.push(search.run)
        for name, layer in layers:
            hook = _Hook(self._first(pl_module, name, search))
            search.push(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        self.announce("trains the activations of the first layer, which the first batch shows", "layers")

    def _first(self, pl_module: pl.LightningModule, name: str, search: UndoList) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module.training and torch.is_grad_enabled() and not is_quiet(pl_module):
                if isinstance(module, _KINDS) and module.weight.requires_grad:
                    search.run()
                    self._attach(pl_module, name, module).enter(module, args, kwargs)
                    before = f", the first Linear or convolution that trains, after {listed(self._before)}"
                    self.say(f"trains the activations of {name}{before if self._before else ''}")
                else:
                    self._before.append(name)

        return hook

    def _attach(self, pl_module: pl.LightningModule, name: str, layer: nn.Module) -> "_ViewByCall":
        """Show the layer's weight through a view that knows the inputs of the current call."""
        self._refuse(pl_module, name, layer)
        view = _ViewByCall(pl_module, layer, self.damping)
        self.undo.push(attach_view(layer, "weight", view))
        self.undo.push(layer.register_forward_pre_hook(_Hook(view.enter), with_kwargs=True).remove)
        self.undo.push(layer.register_forward_hook(_Hook(view.leave), always_call=True).remove)
        self._found = name
        return view

    @override
    def chosen(self) -> Chosen:
        """Return the layer; none before the first batch."""
        return replace(super().chosen(), names=[] if self._found is None else [self._found])

    @override
    def on_before_backward(self, *_: Any) -> None:
        self._ran_backward = True

    @override
    def on_train_batch_end(self, *_: Any) -> None:
        if self._found is None and self._ran_backward:
            raise RuntimeError(f"{self.display_name}: the first batch reached no {_SOUGHT}. {_WAY_OUT}.")

    def _refuse(self, pl_module: pl.LightningModule, name: str, layer: nn.Module) -> None:
        kind = type(layer).__name__
        if not isinstance(layer, _KINDS):
            way_out = "Set layer= to a Linear or a convolution that sees the data"
            raise ValueError(
                f"{self.display_name} needs a Linear or a convolution, and {name!r} is a {kind}. {way_out}."
            )
        if id(layer) in _in_compiled_modules(pl_module):
            raise ValueError(f"{self.display_name}: {name!r} is in a compiled module. Compile the other layers only.")
        if not layer.weight.requires_grad:
            raise ValueError(f"{self.display_name}: {name!r} is frozen. Set layer= to a layer that trains.")
        if has_view(layer, "weight") or is_parametrized(layer, "weight"):
            raise ValueError(
                f"{self.display_name} cannot change the gradient of {name!r}, whose weight is computed from another "
                "tensor. Exclude this layer from the technique that does that, or set layer= to another layer."
            )


def _in_compiled_modules(pl_module: nn.Module) -> set[int]:
    """Return the ids of all compiled modules and their parts."""
    return {id(part) for module in pl_module.modules() if is_compiled(module) for part in module.modules()}


class _Hook:
    """A hook of a module in training. In a copy or pickle of the module it does nothing."""

    def __init__(self, act: Callable[..., None]) -> None:
        self._act = act

    def __call__(self, *args: Any) -> None:
        self._act(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (_nothing,)


def _nothing(*_: Any) -> None:
    pass


class _ViewByCall:
    """The view of a weight, whose gradient depends on the inputs of the call that uses it."""

    def __init__(self, pl_module: pl.LightningModule, layer: nn.Module, damping: float) -> None:
        self._pl_module, self._layer, self._damping = pl_module, layer, damping
        self._inputs: Tensor | None = None

    def enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the inputs of a call in training."""
        if layer.training and torch.is_grad_enabled() and not is_quiet(self._pl_module):
            self._inputs = plain_tensor(args[0] if args else kwargs["input"])

    def leave(self, *_: Any) -> None:
        """Forget them, also after an error."""
        self._inputs = None

    def value(self, dense: Tensor) -> Tensor:
        if self._inputs is None:
            return dense
        return train_activations(dense, self._inputs, self._layer, self._damping)

    def stored(self, dense: Tensor) -> Tensor:
        return dense
