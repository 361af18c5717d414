"""The record of a step, created by a trace for the walk through its graph."""

import os
import sys
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_grad.functional.gradients.autograd import Edge, Node, leaf_of, output_shape
from lightning_grad.functional.gradients.calls import Call
from lightning_grad.functional.gradients.errors import InseparableLossError
from lightning_grad.functional.gradients.rows import Rows, obeys_shape_rule

_NOT_THE_STEP = (str(Path(torch.__file__).parent), str(Path(__file__).parents[2]))  # files of torch and of this package

_name_of_file = lru_cache(1024)(os.path.basename)


class Place(NamedTuple):
    """A call in the step: the function's name, and the file and line of the call."""

    function: str
    code: CodeType | None = None
    line: int = 0

    @property
    def location(self) -> str:
        """File and line, as "module.py:31"."""
        return f"{_name_of_file(self.code.co_filename)}:{self.line}" if self.code is not None else ""

    def __str__(self) -> str:
        return f"{self.function} ({self.location})"

    def refusal(self, reason: str, otherwise: str = "") -> InseparableLossError:
        """Return the error for this call; ``otherwise`` is its subject if the function is unknown."""
        return InseparableLossError(self.function or otherwise, self.location, reason)


NOWHERE = Place("")


def place_of(func: Any) -> Place:
    """Return the name of a function, and the line of the step that called it."""
    frame = sys._getframe(2)
    while frame.f_back is not None and not _is_step(frame.f_code.co_filename):
        frame = frame.f_back
    # T, mT ... are called as getters of properties.
    owner = getattr(func, "__self__", None) if getattr(func, "__name__", "") == "__get__" else None
    name = getattr(func if owner is None else owner, "__name__", str(func)).strip("_")
    return Place(name, frame.f_code, frame.f_lineno)


@lru_cache(1024)
def _is_step(filename: str) -> bool:
    return not filename.startswith(_NOT_THE_STEP)


@dataclass(slots=True, eq=False)
class Record:
    """The record of one step.

    It stores nodes and not their ids: once a node's Python object is released, torch creates a new one, perhaps with
    the id of another node.

    Attributes:
        samples: B.
        constants: Tensors that belong to no sample, by id.
        calls: Calls of losses with a graph, by the node of their result.
        seen: Edges of the inputs of results without rows; with values, also the tensor and its version.
        places: Places where results without rows were computed.
        arguments: Arguments of these calls; only with values.
        fixed: Nodes of results that depend on parameters and constants only.
        moved: Rows that do not follow the shape rule.
    """

    samples: int
    constants: dict[int, Tensor]
    calls: dict[Node, Call] = field(default_factory=dict)
    seen: dict[Edge, tuple[Tensor, int] | None] = field(default_factory=dict)
    places: dict[Node, Place] = field(default_factory=dict)
    arguments: dict[Node, tuple[Any, ...]] = field(default_factory=dict)
    fixed: set[Node] = field(default_factory=set)
    moved: dict[Edge, Rows] = field(default_factory=dict)

    def word_for(self, node: Node) -> str:
        """Return the function and line of a node, such as "mean (module.py:31)", or torch's name for it."""
        return str(self.places.get(node) or node.name())

    def is_constant(self, tensor: Tensor) -> bool:
        """Return True for parameters, constants, and tensors computed from these alone."""
        kind = tensor.__class__
        # Avoid isinstance with Parameter, which runs Python code of torch: this runs for every function of the step.
        if kind is nn.Parameter or (kind is not Tensor and isinstance(tensor, nn.Parameter)):
            return True
        if self.constants and id(tensor) in self.constants:
            return True
        return bool(self.fixed) and tensor.grad_fn in self.fixed

    def is_constant_at(self, edge: Edge) -> bool:
        """Return :meth:`is_constant` for the tensor at an edge."""
        leaf = leaf_of(edge[0])
        return edge[0] in self.fixed if leaf is None else self.is_constant(leaf)

    def rows_at(self, edge: Edge) -> tuple[bool, Rows | None]:
        """Return whether each row of a tensor belongs to one sample, and its rows if they break the shape rule."""
        rows = self.moved.get(edge)
        if rows is not None:
            return not rows.mixed and rows.axis == 0, rows
        leaf = leaf_of(edge[0])
        shape = tuple(leaf.shape) if leaf is not None else output_shape(*edge)
        return obeys_shape_rule(shape, self.samples), None

    def tensor_at(self, edge: Edge) -> Tensor:
        """Return the tensor at an edge.

        Raises:
            InseparableLossError: If it was changed in place after the loss used it.
        """
        leaf = leaf_of(edge[0])
        if leaf is not None:
            return leaf
        found = self.seen[edge]
        assert found is not None
        tensor, version = found
        if tensor._version != version:
            raise NOWHERE.refusal(
                f"A tensor {tuple(tensor.shape)} was changed in place after the loss used it, so its values are lost. "
                "Change a clone of it instead."
            )
        return tensor
