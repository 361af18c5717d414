"""The first and the last layer of a network, whose weights techniques skip by default."""

from collections.abc import Callable, Sequence

import lightning.pytorch as pl
from torch import nn

from lightning_grad.utilities.checks import owned_ids
from lightning_grad.utilities.forward_order import ForwardOrder
from lightning_grad.utilities.parameters import clean_name

Owner = tuple[str, nn.Module, str]


class Ends:
    """The first and the last layer of each network.

    The order is that of registration and, after the first batch, that of execution. A layer after an
    embedding, or after another layer whose weight cannot be chosen, is not a first layer.

    Args:
        trainer: The trainer, with its optimizers.
        pl_module: Its module, complete.
        known: Names of the layers, from a checkpoint; ``None`` before the first batch.
    """

    def __init__(self, trainer: pl.Trainer, pl_module: pl.LightningModule, known: Sequence[str] | None = None) -> None:
        self._trainer = trainer
        self._order = ForwardOrder(pl_module)
        self._layers: list[Owner] = []
        self._choosable: set[str] = set()
        self.known = None if known is None else list(known)

    def find(self, choosable: Sequence[Owner], layers: Sequence[Owner]) -> set[str]:
        """Return the names of the first and the last weights.

        Args:
            choosable: Weights that train and could be chosen.
            layers: These and the weights of all other layers, in order of registration.
        """
        self._layers, self._choosable = list(layers), {clean_name(name) for name, _, _ in choosable}
        return self._as_registered() if self.known is None else set(self.known)

    def watch(self) -> None:
        """Record the order in which the first batch reaches the layers."""
        if self.known is None:
            self._order.watch()

    def stop(self) -> None:
        """Remove the hooks."""
        self._order.stop()

    def learn(self) -> bool:
        """Adopt the order of the first batch on rank zero, on all ranks; return True if it changes the ends."""
        if not self._order.is_watching:
            return False
        self.stop()
        self.known = list(self._trainer.strategy.broadcast(self.seen()))
        return set(self.known) != self._as_registered()

    def seen(self) -> list[str]:
        """Return the names of the ends that this rank knows now."""
        if self.known is not None:
            return self.known
        networks = self._order.networks(self._groups())
        found = [self._ends_of(network, self._order.last) for network in networks or []]
        return sorted(set().union(*found) or self._as_registered())

    def _as_registered(self) -> set[str]:
        return self._ends_of([clean_name(name) for name, _, _ in self._layers], lambda able: able[-1])

    def explain(self, dense: Sequence[str], changed: Sequence[str], effect: str) -> str:
        """Return what the first batch changed, as a clause without subject."""
        parts = [f"keeps {', '.join(map(clean_name, dense))} dense"] if dense else []
        parts += [f"makes {', '.join(map(clean_name, changed))} {effect}"] if changed else []
        return f"{' and '.join(parts)}, because the batch reaches {', '.join(self.known or [])} first or last"

    def _groups(self) -> list[list[str]]:
        moved = [owned_ids(optimizer) for optimizer in self._trainer.optimizers]
        if len(moved) < 2:
            return [[clean_name(name) for name, _, _ in self._layers]]
        owned = [(clean_name(name), id(owner._parameters[attribute])) for name, owner, attribute in self._layers]
        return [[name for name, key in owned if key in ids] for ids in moved]

    def _ends_of(self, network: Sequence[str], last: Callable[[list[str]], str]) -> set[str]:
        able = [name for name in network if name in self._choosable]
        if not able:
            return set()
        trained = {clean_name(n) for n, owner, key in self._layers if owner._parameters[key].requires_grad}  # type: ignore[union-attr]
        root = able[0].split(".")[0]
        # A frozen embedding of another network, such as a teacher, does not come before this
        # network.
        before = [name for name in network[: network.index(able[0])] if name in trained or name.split(".")[0] == root]
        return {last(able)} if before else {able[0], last(able)}
