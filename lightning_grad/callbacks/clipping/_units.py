"""Where the units of each weight lie, for techniques that treat every neuron apart, and which layer is the last.

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
    """A rule that treats the weights of every neuron apart, and so must know which dimension of a weight counts them.

    It finds that out by what each layer computes. A matrix of which it cannot be told is left alone and named, unless its own
    name is spelled in ``include``; then its first dimension counts.
    """

    _second = during_fit.of(dict[int, int])
    _unknown = during_fit.of(list[str])

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._second, unknown = output_dimensions(pl_module)
        names = {known[0]: known for known in all_names(pl_module).values()}
        self._unknown = []
        excluded = self.excluded(pl_module)
        selected = [name for name in unknown if selects(names[name], self.include, excluded)]
        self._unknown = [name for name in selected if not is_spelled(names[name], self.include or [])]
        super().on_fit_start(trainer, pl_module)
        if self._unknown:
            self.say(self._explain())

    def output_dims(self, parameters: Sequence[Tensor]) -> list[int] | None:
        """Return the dimension that counts the units of each parameter, or ``None`` if it is the first for all."""
        return [self._second.get(id(p), 0) for p in parameters] if self._second else None

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
            f"leaves {', '.join(self._unknown)} alone, because the output of the layer is neither x W nor x W^T, so it is not "
            "known which dimension counts the neurons. To take the first, spell the parameter's name in include="
        )


class LastLayers:
    """The last linear layer of each network: the last one registered, and after a batch the one that it reached last.

    Args:
        trainer: The trainer, with its optimizers.
        pl_module: Its module, complete.
    """

    def __init__(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        linear = [(n, owner._parameters[a]) for n, owner, a in named_owners(pl_module) if multiplies_by(owner, a)]
        moved = [owned_ids(optimizer) for optimizer in trainer.optimizers]
        self._groups = [[clean_name(n) for n, p in linear if id(p) in owned] for owned in moved]
        self._strategy = trainer.strategy
        self.order = ForwardOrder(pl_module)
        self.names = [_layer(clean_name(linear[-1][0]))] if linear else []

    def learn(self) -> bool:
        """Take the layers that the first batch reaches last, on all ranks those of rank 0; return whether they are others."""
        if not self.order.is_watching:
            return False
        networks = self.order.networks(self._groups)
        found = [_layer(self.order.last(names)) for names in networks or []]
        before, self.names = self.names, self._strategy.broadcast(found or self.names)
        return set(before) != set(self.names)


def _layer(name: str) -> str:
    return name.rpartition(".")[0] or name
