"""Walk from the returned loss through the autograd graph to the edges at which rows begin."""

from abc import ABC, abstractmethod
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto

from lightning_grad.functional.gradients.autograd import Edge, Node, kind_of, leaf_of, output_shape
from lightning_grad.functional.gradients.calls import Call
from lightning_grad.functional.gradients.errors import InseparableLossError
from lightning_grad.functional.gradients.record import NOWHERE, Place, Record
from lightning_grad.functional.gradients.rows import Rows


# Built-in nodes that are linear in inputs that depend on samples, by kind. Kinds that are not listed are rejected, so a
# missing one causes an error, never a wrong value.
def _kinds(names: str) -> frozenset[str]:
    return frozenset(names.split())


# Linear in all inputs with a graph together.
LINEAR = _kinds(
    "Add Sub Rsub Neg Mean Sum Nansum Trace Cumsum "
    "Squeeze Unsqueeze View UnsafeView ReshapeAlias Alias Expand Clone ToCopy Copy CopySlices "
    "Permute Transpose T Movedim AsStrided Diagonal Flip Roll Repeat ConstantPadNd "
    "Select Slice Index IndexSelect MaskedSelect Gather Take Where MaskedFill "
    "Stack Cat Unbind Split SplitWithSizes IndexAdd IndexPut IndexPutImpl ScatterAdd"
)
# Keep finite numbers unchanged.
GUARDING = _kinds("NanToNum")
# Linear in one input if only that input depends on samples. Div is linear in its first.
SCALED = _kinds("Mul Addcmul")
# Products that sum over a dimension.
CONTRACTING = _kinds("Dot Mv Mm Bmm Addmm Addmv Baddbmm")
# All kinds that a walk can pass through.
PASSED = LINEAR | SCALED | CONTRACTING | {"Div"}
# Kinds that add an input without a graph, which is then part of the constant.
ADDING = _kinds("Add Sub Rsub Stack Cat Where MaskedFill CopySlices IndexPut IndexPutImpl Copy")
# Kinds through which coefficients can be pushed down along one input, below masks: see `Values._counts`.
HOMOGENEOUS = _kinds(
    "Neg Mean Sum Nansum Squeeze Unsqueeze View UnsafeView ReshapeAlias Alias Expand Clone ToCopy "
    "Select Slice Index IndexSelect MaskedSelect Gather Where MaskedFill Mul Div"
)


def is_linear(kind: str, hits: Sequence[bool]) -> bool:
    """Return True if a node is linear in its inputs that depend on samples.

    Args:
        kind: Kind of the node.
        hits: Which of its inputs depend on samples.
    """
    in_one = kind in SCALED or kind in CONTRACTING or (kind == "Div" and hits[0])
    return kind in LINEAR or (in_one and sum(hits) == 1)


Key = tuple[str, str, str, int]


class Input(Enum):
    """How an input of a node depends on samples."""

    NO_GRAPH = auto()
    FIXED = auto()  # computed from parameters and constants only
    ROWS = auto()  # a tensor with rows: the walk ends here
    DEEPER = auto()  # a tensor without rows: the walk continues


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """An edge from a result without rows to a tensor with rows.

    Attributes:
        node: The node of the result.
        index: Index of the input of the node.
        edge: The edge.
        rows: Rows of the tensor if they do not follow the shape rule.
        place: Place of the call in the step.
        call: The node of the loss of ``torch.nn.functional`` that has this input, if any.
        is_product: Whether the tensor is a factor of a product of two tensors with rows.
        is_second: Whether it is the second factor. The gradient flows through both, but the value counts once.
    """

    node: Node
    index: int
    edge: Edge
    rows: Rows | None
    place: Place
    call: Node | None = None
    is_product: bool = False
    is_second: bool = False

    @property
    def key(self) -> Key:
        """Identifies the cut in all steps, independent of shapes."""
        return (self.place.function, self.place.location, self.node.name(), self.index)


class Descent(ABC):
    """Depth-first traversal from the loss, which closes each node after all nodes below it.

    Subclasses decide in :meth:`_open` where the traversal ends, and combine the results of the inputs in
    :meth:`_close`.

    Args:
        record: The record of the step.

    Attributes:
        order: The nodes in the order in which they were closed.
    """

    def __init__(self, record: Record) -> None:
        self._record = record
        self._depends: dict[Node, bool] = {}  # whether a node depends on an end of the traversal
        self._places: dict[Node, Place] = {}
        self.order: list[Node] = []

    def _run(self, root: Node) -> None:
        # Without recursion: a Python sum over a batch is a chain of B nodes.
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
        """Classify the inputs of a node; return the nodes to visit next."""

    @abstractmethod
    def _close(self, node: Node) -> None:
        """Determine whether a node depends on an end of the traversal, after all nodes below it."""


class Walk(Descent):
    """The walk through the graph of a loss.

    :meth:`_close` proves, node by node, that every node between the loss and a cut is linear in its inputs that depend
    on samples. It rejects unknown nodes.

    Args:
        root: The node of the loss.
        record: The record of the step.
        like: Keys of proven cuts; ``None`` if there are none.

    Attributes:
        order: Nodes from the loss downwards, each before the nodes below it.
        cuts: The edges at which rows begin.
        calls: Nodes of losses of ``torch.nn.functional`` with a reduction.
        inputs: The kind of each input of a node.
        learned: Places of factors with a graph that multiply the loss.
        adding: Nodes that may add something without a graph.
    """

    def __init__(self, root: Node, record: Record, like: frozenset[Key] | None = None) -> None:
        super().__init__(record)
        self._like = None if record.samples == 1 else like  # with one sample, every cut is right
        self.cuts: list[Cut] = []
        self.calls: list[Node] = []
        self.inputs: dict[Node, list[Input]] = {}
        self.learned: list[Place] = []
        self.adding: list[Node] = []
        if root in record.fixed:
            raise NOWHERE.refusal("The loss depends on parameters only and not on samples.")
        self._run(root)
        self.order.reverse()
        if not self.cuts:
            raise NOWHERE.refusal(f"The loss depends on no tensor with rows for the {record.samples} samples.")

    def _open(self, node: Node, place: Place) -> Iterator[Node]:
        """Classify the inputs of a node and add cuts; yield the nodes to visit next."""
        call = self._record.calls.get(node)
        if call is not None and call.reduction != "none":
            self._enter(node, call, place)
            return
        if kind_of(node) not in PASSED:
            self._refuse(node)
        found = self.inputs[node] = []
        for index, edge in enumerate(node.next_functions):
            rows = None
            kind = Input.NO_GRAPH
            if edge[0] is not None:
                kind, rows = self._kind_of_input(node, index, edge, place)
            found.append(kind)
            if kind is Input.ROWS:
                self.cuts.append(Cut(node, index, edge, rows, place))
            elif kind is Input.DEEPER:
                yield edge[0]

    def _kind_of_input(self, node: Node, index: int, edge: Edge, place: Place) -> tuple[Input, Rows | None]:
        """Classify one input of a node; also return its rows if they break the shape rule."""
        record, leaf = self._record, leaf_of(edge[0])
        if edge[0] in record.fixed if leaf is None else record.is_constant(leaf):
            return Input.FIXED, None
        has_rows, rows = record.rows_at(edge)
        # Tensors that torch computes inside a call were not recorded, and their shapes match B only by coincidence,
        # such as the last chunk of a cross-entropy. Only inputs of recorded calls count.
        if not has_rows or (leaf is None and edge not in record.seen):
            return Input.DEEPER, None
        if rows is None and self._like is not None and Cut(node, index, edge, rows, place).key not in self._like:
            return Input.DEEPER, None
        return Input.ROWS, rows

    def _enter(self, node: Node, call: Call, place: Place) -> None:
        """Add cuts at the inputs of a loss of ``torch.nn.functional``."""
        if call.problem:
            raise InseparableLossError(call.name, place.location, call.problem)
        self.calls.append(node)
        self._depends[node] = True
        if call.others:
            self.learned.append(place)
        for inner, index, edge in entries(node, call.inputs, call.others):
            self.cuts.append(Cut(inner, index, edge, call.inputs[edge], place, call=node))

    def _close(self, node: Node) -> None:
        """Prove that a node is linear in its inputs that depend on samples, after all nodes below it."""
        if self._depends[node]:
            return
        kinds, kind = self.inputs[node], kind_of(node)
        below = zip(kinds, node.next_functions, strict=True)
        hits = [k is Input.ROWS or (k is Input.DEEPER and self._depends[edge[0]]) for k, edge in below]
        if not any(hits):
            self._refuse_unknown(node, kinds)
            return
        self._depends[node] = True
        others = [k is not Input.NO_GRAPH and not hit for k, hit in zip(kinds, hits, strict=True)]
        if is_linear(kind, hits):
            if kind in ADDING and (Input.NO_GRAPH in kinds or kind == "Rsub"):
                self.adding.append(node)
            if kind not in LINEAR and any(others):
                self.learned.append(self._places[node])
        elif kind in CONTRACTING and sum(hits) == 2 and _is_number(node):
            first, second = (i for i, hit in enumerate(hits) if hit)
            self._mark_factor(node, first, is_second=False)
            self._mark_factor(node, second, is_second=True)
        else:
            self._refuse(node)

    def _mark_factor(self, node: Node, index: int, is_second: bool) -> None:
        """Mark the cuts below a factor of a product: the sum of e_i * e_i has two gradients, but one value."""
        below: set[Node] = set()
        todo = [node.next_functions[index][0]] if self.inputs[node][index] is Input.DEEPER else []
        while todo:
            inner = todo.pop()
            below.add(inner)
            todo += [edge[0] for edge in inner.next_functions if edge[0] in self.inputs and edge[0] not in below]
        for i, cut in enumerate(self.cuts):
            if cut.node in below or (cut.node is node and cut.index == index):
                self.cuts[i] = replace(cut, is_product=True, is_second=is_second)

    def _refuse_unknown(self, node: Node, kinds: list[Input]) -> None:
        """Reject a node that depends on no known sample, unless it depends on parameters and constants only."""
        if kinds and all(k is not Input.NO_GRAPH for k in kinds) and kind_of(node):
            return
        place = self._places[node]
        if leaf_of(node) is not None:
            raise place.refusal("uses a tensor that requires grad, but is not a parameter and has no rows.")
        if kind_of(node):
            raise place.refusal(
                f"combines parameters with a tensor that has no rows for the {self._record.samples} samples, so it is "
                "unknown "
                "whether its result belongs to a sample. If not, register the tensor as a buffer of the module.",
                node.name(),
            )
        self._refuse(node)

    def _refuse(self, node: Node) -> None:
        """Raise the error for a node that is not known to be linear."""
        place, shape = self._places[node], output_shape(node, 0)
        if len(shape) > 1 and kind_of(node) not in CONTRACTING:
            reason = (
                f"returned a tensor {shape}, in which the {self._record.samples} samples of the batch are not the "
                "rows: the step works on something else (windows, nodes, boxes), or mixes the samples."
            )
        else:
            reason = (
                f"mixes the samples or is not supported ({node.name()}), so the loss is not known to be a mean of one "
                "term per sample."
            )
        raise place.refusal(reason, node.name())


def entries(node: Node, inputs: Container[Edge], others: Container[Edge] = ()) -> Iterator[tuple[Node, int, Edge]]:
    """Find the edges to the inputs of a call: yield the node inside the call, the index of its input, and the edge."""
    todo, known = [node], {node}
    while todo:
        inner = todo.pop()
        for index, edge in enumerate(inner.next_functions):
            if edge in inputs:
                yield inner, index, edge
            elif edge[0] is not None and edge not in others and edge[0] not in known:
                known.add(edge[0])
                todo.append(edge[0])


def _is_number(node: Node) -> bool:
    return all(size == 1 for size in output_shape(node, 0))
