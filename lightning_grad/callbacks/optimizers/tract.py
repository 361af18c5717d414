"""TrAct: the callback. The rule is :func:`lightning_grad.functional.train_activations`."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from typing_extensions import override

from lightning_grad.core import (
    WHOLE_WEIGHTS,
    Compatibility,
    GradCallback,
    UndoList,
    attach_view,
    check_above,
    during_fit,
    is_quiet,
    no,
)
from lightning_grad.core.views.weight_view import has_view
from lightning_grad.functional import train_activations
from lightning_grad.functional.choices import hint_for
from lightning_grad.utilities.checks import check_finite
from lightning_grad.utilities.parameters import clean_name

_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_OTHER_FIRST_LAYERS = (nn.Embedding, nn.EmbeddingBag, nn.MultiheadAttention, nn.RNNBase, nn.Bilinear)


class TrAct(GradCallback):
    r"""Train the first layer in the steepest direction of its activations instead of its weights.

    .. math::
        G \leftarrow \frac{\partial L}{\partial Z}^{\!\top} X \, \Bigl(\frac{X^\top X}{b} + \lambda I\Bigr)^{-1}

    X are the inputs of the layer (b rows, one for each sample and position), Z its outputs. The plain
    gradient of a first layer grows with the contrast and brightness of its inputs; this one does not.
    Only the gradient of this one weight changes.

    Args:
        damping: lambda, above 0 (0.1 in the paper, which uses it everywhere).
        layer: Name of the layer. Default: the Linear or convolution that the first batch reaches
            first.
        name: Name of this instance, needed if two are used.

    Raises:
        ValueError: In the constructor if damping is not above 0 or not finite. Before the first batch
            if no layer has this name, it is no Linear or convolution, it is frozen, or another
            technique shows its weight through a view; under FSDP and DeepSpeed; with compiled modules.
            In the first batch, if ``layer`` is not set and the first layer is of another kind.

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
        compiled=no(
            "reads the inputs of a layer by hooks, and {} would not call them for each batch",
            "Compile the other layers only, or drop the callback",
        ),
        **WHOLE_WEIGHTS,
    )
    neutral: ClassVar[Mapping[str, Any] | str] = "no damping leaves the gradient of the layer as it is"

    _found = during_fit[str | None](lambda _: None)

    def __init__(self, damping: float = 0.1, layer: str | None = None, name: str | None = None) -> None:
        super().__init__(name)
        self.damping = check_finite(check_above(damping, 0.0, "damping"), "damping")
        self.layer = layer

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        named = {clean_name(name): module for name, module in pl_module.named_modules()}
        if self.layer is not None:
            if self.layer not in named:
                layers = [name for name, module in named.items() if isinstance(module, _KINDS)]
                raise ValueError(
                    f"{self.display_name}: no layer is named {self.layer!r}.{hint_for(self.layer, layers)}"
                )
            self._attach(pl_module, self.layer, named[self.layer])
            return
        search = UndoList()
        self.undo.push(search.run)
        for name, module in named.items():
            if isinstance(module, (*_KINDS, *_OTHER_FIRST_LAYERS)):
                search.push(
                    module.register_forward_pre_hook(self._first(pl_module, name, search), with_kwargs=True).remove
                )
        self.announce("trains the activations of the layer that the first batch reaches first", "layers")

    def _first(self, pl_module: pl.LightningModule, name: str, search: UndoList) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module.training and torch.is_grad_enabled() and not is_quiet(pl_module):
                search.run()
                self._attach(pl_module, name, module).enter(module, args, kwargs)

        return hook

    def _attach(self, pl_module: pl.LightningModule, name: str, layer: nn.Module) -> "_ViewByCall":
        """Show the layer's weight through a view that knows the inputs of the current call."""
        self._refuse(name, layer)
        view = _ViewByCall(pl_module, layer, self.damping)
        self.undo.push(attach_view(layer, "weight", view))
        self.undo.push(layer.register_forward_pre_hook(view.enter, with_kwargs=True).remove)
        self.undo.push(layer.register_forward_hook(view.leave, always_call=True).remove)
        self.announce(f"trains the activations of {name}", "layers", [name])
        return view

    def _refuse(self, name: str, layer: nn.Module) -> None:
        kind = type(layer).__name__
        if not isinstance(layer, _KINDS):
            way_out = "Set layer= to a Linear or a convolution that sees the data"
            raise ValueError(
                f"{self.display_name} needs a Linear or a convolution, and {name!r} is a {kind}. {way_out}."
            )
        if not layer.weight.requires_grad:
            raise ValueError(f"{self.display_name}: {name!r} is frozen. Set layer= to a layer that trains.")
        if has_view(layer, "weight") or is_parametrized(layer, "weight"):
            raise ValueError(
                f"{self.display_name} cannot change the gradient of {name!r}, whose weight is computed from another "
                "tensor. Exclude this layer from the technique that does that, or set layer= to another layer."
            )


class _ViewByCall:
    """The view of a weight, whose gradient depends on the inputs of the call that uses it."""

    def __init__(self, pl_module: pl.LightningModule, layer: nn.Module, damping: float) -> None:
        self._pl_module, self._layer, self._damping = pl_module, layer, damping
        self._inputs: Tensor | None = None

    def enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the inputs of a call in training."""
        if layer.training and torch.is_grad_enabled() and not is_quiet(self._pl_module):
            self._inputs = args[0] if args else kwargs["input"]

    def leave(self, *_: Any) -> None:
        """Forget them, also after an error."""
        self._inputs = None

    def value(self, dense: Tensor) -> Tensor:
        if self._inputs is None:
            return dense
        return train_activations(dense, self._inputs, self._layer, self._damping)

    def stored(self, dense: Tensor) -> Tensor:
        return dense
