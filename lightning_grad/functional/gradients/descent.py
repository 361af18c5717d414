"""Going through the autograd graph of a loss, and the rule by which a node is linear in what depends on samples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

from lightning_grad.functional.gradients.autograd import Node
from lightning_grad.functional.gradients.nodes import CONTRACTING, LINEAR, SCALED
from lightning_grad.functional.gradients.record import Place, Record


class Descent(ABC):
    """Goes from the loss down, and closes each node once all below it are closed.

    A subclass says in :meth:`_open` where the way ends, and in :meth:`_close` what a node makes of what lies below it.

    Args:
        record: Of the step.

    Attributes:
        order: The nodes in the order in which they were closed.
    """

    def __init__(self, record: Record) -> None:
        self._record = record
        self._depends: dict[Node, bool] = {}  # on what the way ends at
        self._places: dict[Node, Place] = {}
        self.order: list[Node] = []

    def _run(self, root: Node) -> None:
        # Without recursion: a Python sum over a batch is a chain of as many nodes.
        todo = [(root, Place(""), False)]
        while todo:
            node, above, is_done = todo.pop()
            if is_done:
                self._close(node)
                self.order.append(node)
            elif node not in self._depends:
                self._depends[node] = False
                place = self._places[node] = self._record.places.get(node, above)
                todo.append((node, above, True))
                todo += [(below, place, False) for below in self._open(node, place)]

    @abstractmethod
    def _open(self, node: Node, place: Place) -> Iterable[Node]:
        """Find out what the inputs of a node are; return the nodes to visit next."""

    @abstractmethod
    def _close(self, node: Node) -> None:
        """Find out whether a node depends on what the way ends at, once all below it is known."""


def is_linear(kind: str, hits: Sequence[bool]) -> bool:
    """Return whether a node is linear in those of its inputs that depend on samples.

    Args:
        kind: Of the node.
        hits: Which of its inputs do.
    """
    if kind in LINEAR:
        return True
    return sum(hits) == 1 and (kind in SCALED or kind in CONTRACTING or (kind == "Div" and hits[0]))
