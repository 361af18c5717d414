"""The scales of rounded weights, which ``ZerothOrder`` trains in place of the weights (QZO)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_grad.core import WeightCallback
from lightning_grad.functional import rescale_, round_to_scales_
from lightning_grad.functional.plain_tensors import plain_tensor
from lightning_grad.utilities.parameters import clean_name, named_owners
from lightning_grad.utilities.reporting import counted, listed
from lightning_grad.utilities.rounding import is_layer_weight
from lightning_grad.utilities.weight_axes import output_dimension

_LEAST_SCALE = 1e-30  # a scale of 0 would lose the integers


class ScalesByName(dict[str, Tensor]):
    """The scales of each weight, (groups, 1), by the name of the weight."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies, because steps change the scales in place."""
        return {name: scales.clone() for name, scales in self.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace the scales, in place where they are in use."""
        for name, scales in state.items():
            if name in self:
                self[name].copy_(scales)
            else:
                self[name] = scales.clone()

    def __copy__(self) -> ScalesByName:
        return ScalesByName(self)


@dataclass(frozen=True)
class _Scaled:
    weight: Tensor
    dim: int
    scales: Tensor
    shown: Tensor  # those that the weight has now


class TrainedScales:
    """Weights of a module that are rounded to integers times scales, of which the scales train.

    Args:
        pl_module: The module. Its chosen weights are rounded, unless their scales are known.
        trained: ``id()`` of the parameters that may be chosen.
        bits: Bits of a weight.
        group_size: Entries of an output channel that share a scale; ``None`` for all. It is ignored where it does not
            divide the channel.
        scales: Scales that a checkpoint holds; those of the other weights are added.
        display_name: Name of the technique, for errors.

    Attributes:
        names: Names of the weights.
        words: What to announce.

    Raises:
        ValueError: If there is no such weight, or one has the type float16.
    """

    def __init__(
        self,
        pl_module: pl.LightningModule,
        trained: set[int],
        bits: int,
        group_size: int | None,
        scales: ScalesByName,
        display_name: str,
    ) -> None:
        self.names: list[str] = []
        ungrouped: list[str] = []
        self._weights: dict[int, _Scaled] = {}
        for name, owner, attribute in _layer_weights(pl_module, trained):
            parameter = owner._parameters[attribute]
            assert parameter is not None
            if id(parameter) in self._weights:
                continue
            _refuse_float16(parameter, name, display_name)
            weight, dim = plain_tensor(parameter.detach()), output_dimension(owner, attribute) or 0
            fits = weight.numel() // weight.shape[dim] % (group_size or 1) == 0
            if name not in scales:
                scales[name] = round_to_scales_(weight, bits, group_size if fits else None, dim)
            scales[name] = scales[name].to(weight.device)
            self._weights[id(parameter)] = _Scaled(weight, dim, scales[name], scales[name].clone())
            self.names.append(name)
            ungrouped += [] if fits else [name]
        if not self._weights:
            raise ValueError(
                f"{display_name} with bits finds no weight to round. It rounds the weights of Linear, Conv and attention "
                "layers that the optimizer holds. Choose others with include=, or train all parameters with bits=None."
            )
        self.words = (
            f"rounds {counted(len(self.names), 'weight')} to {bits} bits, and trains their scales without backward"
        )
        if ungrouped:
            names = listed(ungrouped, 3)
            self.words += f". Groups of {group_size} do not fit into the channels of {names}, which have one scale each"

    @property
    def ids(self) -> set[int]:
        """``id()`` of the rounded parameters."""
        return set(self._weights)

    def of(self, parameter: Tensor) -> Tensor:
        """Return the scales of a parameter."""
        return self._weights[id(parameter)].scales

    def show(self, step: bool) -> None:
        """Give the weights the scales as they are now.

        Args:
            step: Whether a step has moved the scales: negative ones then become (almost) 0.
        """
        for each in self._weights.values():
            if step:
                each.scales.clamp_(min=_LEAST_SCALE)
            else:
                each.scales.copy_(torch.where(each.scales.abs() < _LEAST_SCALE, _LEAST_SCALE, each.scales))
            rescale_(each.weight, each.shown, each.scales, each.dim)
            each.shown.copy_(each.scales)

    def is_restored(self) -> None:
        """Take the scales of a checkpoint, whose weights the module has loaded already, for those of the weights."""
        for each in self._weights.values():
            each.shown.copy_(each.scales)


def _refuse_float16(weight: Tensor, name: str, display_name: str) -> None:
    if weight.dtype == torch.float16:
        raise ValueError(
            f"{display_name} with bits needs weights of a wider range than {name} of torch.float16 has: a scale close to 0 "
            "would lose the integers. Train with precision='bf16-true' or 32."
        )


def refuse_with_bits(trainer: pl.Trainer, readers: Sequence[str], display_name: str) -> None:
    """Raise if something reads the gradients of weights, or shows the module other weights.

    Raises:
        ValueError: Names it, and says what to do.
    """
    if readers:
        raise ValueError(
            f"{display_name} with bits steps the scales in place, so no gradient of a weight exists for {listed(readers)}. "
            "Train with torch.optim.SGD without momentum, and remove what reads gradients."
        )
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    views = [callback for callback in callbacks if isinstance(callback, WeightCallback)]
    if views:
        raise ValueError(
            f"{display_name} with bits rounds weights, and {views[0].display_name} shows the module other weights in their "
            "place. Keep one of them."
        )


def _layer_weights(pl_module: nn.Module, trained: set[int]) -> list[tuple[str, nn.Module, str]]:
    """Return (name, owner, attribute) of the weights of layers that multiply by a matrix."""
    owners = list(named_owners(pl_module))
    looked_up = {id(o._parameters[a]) for _, o, a in owners if isinstance(o, (nn.Embedding, nn.EmbeddingBag))}
    return [
        (clean_name(name), owner, attribute)
        for name, owner, attribute in owners
        if id(p := owner._parameters[attribute]) in trained - looked_up
        and p is not None
        and p.is_floating_point()
        and p.ndim > 1
        and is_layer_weight(owner, attribute)
    ]
