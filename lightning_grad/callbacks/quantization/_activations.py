"""Rounded activations: the layers whose inputs are rounded in a fit, and what the module computes without the rounding.

Used only by :class:`lightning_grad.callbacks.QuantizationAwareTraining`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torchmetrics import Metric

from lightning_grad.callbacks.quantization._grid_weight import GridWeight
from lightning_grad.core import WrapOrder, quiet, wrap_method
from lightning_grad.utilities.activation_quantization import RoundedInput, why_input_stays
from lightning_grad.utilities.batch_copies import copy_of
from lightning_grad.utilities.parameters import clean_name

Gap = tuple[str, float, float]
"""A metric, its value with rounded activations, and its value without."""


class RoundedInputs:
    """The layers whose inputs are rounded."""

    def __init__(self) -> None:
        self._hooks: dict[str, tuple[RoundedInput, RemovableHandle]] = {}
        self.skipped: dict[str, str] = {}
        self.weights: list[GridWeight] = []

    @property
    def formats(self) -> dict[str, dict[str, Any]]:
        """The arguments of each layer's rounding, by the name of the layer."""
        return {name: hook.format for name, (hook, _) in self._hooks.items()}

    def follow(self, module: nn.Module, weights: Sequence[GridWeight], form: Mapping[str, Any]) -> None:
        """Round the inputs of the layers of the chosen weights, and no others."""
        self.weights = list(weights)
        layers = {clean_name(name): layer for name, layer in module.named_modules(remove_duplicate=False)}
        wanted: dict[str, nn.Module] = {}
        for weight in weights:
            for name in weight.found.names or (clean_name(weight.name),):
                owner, _, attribute = name.rpartition(".")
                if reason := why_input_stays(layers[owner], attribute):
                    self.skipped[owner or "the module"] = reason
                elif not any(layers[owner] is layer for layer in wanted.values()):
                    wanted[owner] = layers[owner]
        for name in self._hooks.keys() - wanted.keys():
            self._hooks.pop(name)[1].remove()
        for name in wanted.keys() - self._hooks.keys():
            hook = RoundedInput(**form)
            self._hooks[name] = (hook, wanted[name].register_forward_pre_hook(hook, with_kwargs=True))
        self._hooks = {name: self._hooks[name] for name in wanted}

    def turn(self, is_on: bool) -> None:
        """Turn the rounding on or off."""
        for hook, _ in self._hooks.values():
            hook.is_on = is_on

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Compute without the rounding."""
        were = {name: hook.is_on for name, (hook, _) in self._hooks.items()}
        self.turn(False)
        try:
            yield
        finally:
            for name, is_on in were.items():
                self._hooks[name][0].is_on = is_on

    def remove(self) -> None:
        """Remove all hooks."""
        for _, handle in self._hooks.values():
            handle.remove()


def gaps_of(trainer: pl.Trainer, pl_module: pl.LightningModule, inputs: RoundedInputs, *arguments: Any) -> list[Gap]:
    """Return what ``validation_step`` logs for a batch with and without rounded activations; leaves no trace.

    Args:
        trainer: The trainer.
        pl_module: Its module, in validation.
        inputs: The rounded inputs.
        arguments: Batch, its index and the index of its loader.
    """
    names = list(inspect.signature(pl_module.validation_step).parameters)
    if names[:1] == ["dataloader_iter"]:
        return []
    given = arguments[: max(len(names), 1)] if "args" not in names else arguments
    rounded = _logged(trainer, pl_module, given)
    with inputs.paused():
        plain = _logged(trainer, pl_module, given)
    return [(name, rounded[name], plain[name]) for name in rounded if name in plain]


def _logged(trainer: pl.Trainer, pl_module: pl.LightningModule, arguments: Sequence[Any]) -> dict[str, float]:
    """Run ``validation_step`` on a copy of the batch, and return the scalars that it logs."""
    found: dict[str, Any] = {}

    def log(_: Any, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        found[name] = value

    def log_dict(_: Any, dictionary: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        found.update(dictionary)

    with quiet(trainer, pl_module, check=False), torch.no_grad(), trainer.precision_plugin.val_step_context():
        undo = [
            wrap_method(pl_module, "log", log, order=WrapOrder.LOOK),
            wrap_method(pl_module, "log_dict", log_dict, order=WrapOrder.LOOK),
        ]
        try:
            pl_module.validation_step(*copy_of(tuple(arguments)))
            values = {name: _number(value) for name, value in found.items()}
        finally:
            for restore in undo:
                restore()
    return {name: value for name, value in values.items() if value is not None}


def _number(value: Any) -> float | None:
    """Return a logged value as a number; ``None`` if it is none."""
    if isinstance(value, Metric):
        value = value.compute() if value._forward_cache is None else value._forward_cache
    if isinstance(value, Tensor):
        return float(value) if value.numel() == 1 else None
    return float(value) if isinstance(value, (int, float)) else None


def points(gap: Gap) -> float:
    """Return the size of a gap in points: percent of a metric up to 1, or of its own value if that is larger."""
    _, rounded, plain = gap
    return 100 * abs(plain - rounded) / max(1.0, abs(rounded))
