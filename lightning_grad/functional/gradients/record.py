"""What a trace keeps of a step for the walk through its graph."""

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

_NOT_THE_STEP = (str(Path(torch.__file__).parent), str(Path(__file__).parents[2]))  # torch, and this package

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
        """Return the error that names the call, or something else where its function is not known."""
        return InseparableLossError(self.function or otherwise, self.location, reason)


NOWHERE = Place("")


def place_of(func: Any) -> Place:
    """Return a function's name, and the line of the step that called it."""
    frame = sys._getframe(2)
    while frame.f_back is not None and not _is_step(frame.f_code.co_filename):
        frame = frame.f_back
    # T, mT ... are the getters of properties.
    owner = getattr(func, "__self__", None) if getattr(func, "__name__", "") == "__get__" else None
    name = getattr(func if owner is None else owner, "__name__", str(func)).strip("_")
    return Place(name, frame.f_code, frame.f_lineno)


@lru_cache(1024)
def _is_step(filename: str) -> bool:
    return not filename.startswith(_NOT_THE_STEP)


@dataclass(slots=True, eq=False)
class Record:
    """The record of one step.

    Nodes are kept, not their ids: torch makes a new Python object, perhaps with an old id, once nobody has the first.

    Attributes:
        samples: B.
        constants: Tensors that belong to no sample, by id.
        calls: Calls of losses with a graph, by the node of their result.
        seen: The edges of tensors that went into a result without rows; with values the tensor and its version.
        places: Where results without rows were computed.
        arguments: The arguments of these calls; with values only.
        fixed: Nodes of results that depend on parameters and constants only.
        moved: Rows that are not by the shape rule.
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
        """Return the function and the line of a node, as "mean (module.py:31)", or what torch calls it."""
        return str(self.places.get(node) or node.name())

    def is_constant(self, tensor: Tensor) -> bool:
        """Return whether a tensor is a parameter, a constant, or computed from these alone."""
        kind = tensor.__class__
        # isinstance with Parameter runs Python code of torch, and this runs for every function of the step.
        if kind is nn.Parameter or (kind is not Tensor and isinstance(tensor, nn.Parameter)):
            return True
        if self.constants and id(tensor) in self.constants:
            return True
        return bool(self.fixed) and tensor.grad_fn in self.fixed

    def is_constant_at(self, edge: Edge) -> bool:
        """Return the same for the tensor to which an edge leads."""
        leaf = leaf_of(edge[0])
        return edge[0] in self.fixed if leaf is None else self.is_constant(leaf)

    def rows_at(self, edge: Edge) -> tuple[bool, Rows | None]:
        """Return whether each row of a tensor belongs to one sample as far as known, and what goes beyond the shape rule."""
        rows = self.moved.get(edge)
        if rows is not None:
            return not rows.mixed and rows.axis == 0, rows
        leaf = leaf_of(edge[0])
        shape = tuple(leaf.shape) if leaf is not None else output_shape(*edge)
        return obeys_shape_rule(shape, self.samples), None

    def tensor_at(self, edge: Edge) -> Tensor:
        """Return the tensor to which an edge leads.

        Raises:
            InseparableLossError: If it was changed in place since it went into the loss.
        """
        leaf = leaf_of(edge[0])
        if leaf is not None:
            return leaf
        found = self.seen[edge]
        assert found is not None
        tensor, version = found
        if tensor._version != version:
            raise NOWHERE.refusal(
                f"A tensor {tuple(tensor.shape)} was changed in place after it went into the loss, so its values are lost. "
                "Change a clone of it instead."
            )
        return tensor
