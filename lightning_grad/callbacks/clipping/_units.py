"""Find the dimension of each weight that counts the neurons, and the last linear layer.

Used by ``adaptive_gradient_clipping.py`` and ``gradient_centralization.py``.
"""

from collections.abc import Sequence

import lightning.pytorch as pl
from torch import Tensor
from typing_extensions import override

from lightning_grad.core import GradientConditioner, during_fit
from lightning_grad.utilities.checks import owned_ids
from lightning_grad.utilities.forward_order import ForwardOrder
from lightning_grad.utilities.parameters import all_names, clean_name, is_spelled, named_owners, selects
from lightning_grad.utilities.weight_axes import multiplies_by, output_dimensions


class UnitConditioner(GradientConditioner):
    """A rule that treats the weights of each neuron separately.

    It must know which dimension of a weight counts the neurons, and infers that from what the layer
    computes. It ignores a matrix for which that fails and names it in the log, unless ``include``
    spells out the name of that matrix; then the first dimension counts the neurons.
    """

    _output_dims = during_fit.of(dict[int, int])
    _unknown = during_fit.of(list[str])

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._output_dims, unknown = output_dimensions(pl_module)
        names = {known[0]: known for known in all_names(pl_module).values()}
        self._unknown = []
        excluded = self.excluded(pl_module)
        selected = [name for name in unknown if selects(names[name], self.include, excluded)]
        self._unknown = [name for name in selected if not is_spelled(names[name], self.include or [])]
        super().on_fit_start(trainer, pl_module)
        if self._unknown:
            self.say(self._explain())

    def output_dims(self, parameters: Sequence[Tensor]) -> list[int] | None:
        """Return the dimension that counts the units of each parameter, or ``None`` if all use the first."""
        return [self._output_dims.get(id(p), 0) for p in parameters] if self._output_dims else None

    @override
    def excluded(self, pl_module: pl.LightningModule) -> list[str]:
        return [*super().excluded(pl_module), *self._unknown]

    @override
    def check_choice(self, pl_module: pl.LightningModule) -> None:
        if self._unknown and not self.parameters():
            raise ValueError(f"{self.display_name} has no parameter to act on: it {self._explain()}.")
        super().check_choice(pl_module)

    def _explain(self) -> str:
        return (
            f"ignores {', '.join(self._unknown)}, because the layer computes neither x W nor x W^T, so the dimension that "
            "counts the neurons is unknown. To use the first dimension, spell the parameter's name in include="
        )


class LastLayers:
    """The last linear layer of each network: at first the last one registered, then the last one that runs.

    Args:
        trainer: The trainer, with its optimizers.
        pl_module: Its module, with all its layers.
    """

    def __init__(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        linear = [(n, owner._parameters[a]) for n, owner, a in named_owners(pl_module) if multiplies_by(owner, a)]
        moved = [owned_ids(optimizer) for optimizer in trainer.optimizers]
        self._groups = [[clean_name(n) for n, p in linear if id(p) in owned] for owned in moved]
        self._strategy = trainer.strategy
        self.order = ForwardOrder(pl_module)
        self.names = [_layer(clean_name(linear[-1][0]))] if linear else []

    def learn(self) -> bool:
        """Use the layers that ran last in the first batch on rank 0. Return True if they differ from before."""
        if not self.order.is_watching:
            return False
        networks = self.order.networks(self._groups)
        found = [_layer(self.order.last(names)) for names in networks or []]
        before, self.names = self.names, self._strategy.broadcast(found or self.names)
        return set(before) != set(self.names)


def _layer(name: str) -> str:
    return name.rpartition(".")[0] or name
