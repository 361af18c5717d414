"""Whether the loss that a step returns is made of one call of a loss, and of nothing else that depends on the samples."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Sequence
from types import FrameType
from typing import Any, NamedTuple, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from lightning_grad.functional.loss_capture import LossCall, LossCapture
from lightning_grad.functional.plain_tensors import plain_tensor

# Backward nodes of operations that are linear in what they are given, as autograd names them.
_LINEAR = frozenset(
    {"Add", "Sub", "Rsub", "Neg", "Mean", "Sum", "Nansum", "Cumsum", "NanToNum", "Clone", "ToCopy", "CopyBackwards"}
    | {"Squeeze", "Unsqueeze", "View", "UnsafeView", "ReshapeAlias", "Expand", "Permute", "T", "Transpose", "AsStrided"}
    | {"Stack", "Cat", "Select", "Slice", "Index", "Where", "MaskedFill", "MaskedSelect", "Unbind", "Split", "Gather"}
    | {"IndexSelect", "Alias", "CopySlices", "Repeat"}
)
_FROM_OUTSIDE = (torch.tensor, torch.as_tensor, torch.from_numpy, torch.frombuffer, torch.asarray)


class _Seen(NamedTuple):
    edge: GradientEdge | None
    value: Tensor


class WholeLossCapture(LossCapture):
    """A capture that can also say what else the loss of a step consists of. It costs more, and is used for one step.

    What is computed from parameters, buffers and constants alone, such as a weight decay written by hand, is the same for
    all samples and does not count. For that every operation of the step is followed.

    Args:
        module: The module that is run.
        samples: As in :class:`LossCapture`.
        way_out: As in :class:`LossCapture`.

    Example:
        >>> layer, x = nn.Linear(2, 1), torch.randn(4, 2)
        >>> with WholeLossCapture(layer) as capture:
        ...     y = layer(x)
        ...     seen = torch.nn.functional.mse_loss(y, x[:, :1])
        ...     decay, size = layer.weight.square().sum(), y.abs().mean()
        >>> capture.rest_of(seen / 2 + decay, capture.only()) is None
        True
        >>> capture.rest_of(seen + size, capture.only())
        'there is also mean (...'
    """

    def __init__(self, module: nn.Module, samples: int | None = None, **arguments: Any) -> None:
        super().__init__(samples, keep_graph=True, **arguments)
        # Tensors are kept, so that no other gets the identity of one of them.
        self._fixed: dict[int, Tensor] = {id(t): t for t in itertools.chain(module.parameters(), module.buffers())}
        self._fixed_nodes: set[Node] = set()
        self._places: dict[Node, str] = {}
        self._seen: list[_Seen] = []

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        if len(self.calls) > len(self._seen):
            # As it is now: a step may add to it in place.
            edge = None if result.grad_fn is None else GradientEdge(result.grad_fn, result.output_nr)
            self._seen.append(_Seen(edge, plain_tensor(result).detach().clone()))
        self._follow(func, args, kwargs or {}, result)
        return result

    def _follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Note which tensors know no samples, and where each node comes from."""
        given = _tensors((args, kwargs))
        results = _tensors(result)
        from_outside = func in _FROM_OUTSIDE and any(tensor.numel() > 1 for tensor in results)
        is_fixed = not from_outside and all(id(tensor) in self._fixed for tensor in given)
        if not is_fixed and func is Tensor.__setitem__:
            self._fixed.pop(id(args[0]), None)
        for tensor in results:
            node = tensor.grad_fn
            if node is not None and node not in self._places:
                self._places[node] = f"{getattr(func, '__name__', 'an operation')} ({_place()})"
            if is_fixed:
                self._fixed[id(tensor)] = tensor
            else:
                self._fixed.pop(id(tensor), None)  # written in place
            if is_fixed and node is not None:
                self._fixed_nodes.add(node)

    def rest_of(self, loss: Tensor, call: LossCall) -> str | None:
        """Return what makes a step's loss more than one call, by the function and the line; ``None`` if nothing does.

        Args:
            loss: What the step returns, with its graph; a plain tensor.
            call: One of :attr:`calls`.
        """
        edge, value = self._seen[self.calls.index(call)]
        if loss.grad_fn is None or edge is None or edge.node is None:
            # Without a graph only the values can be compared: a metric, or a loss inside a reentrant checkpoint.
            is_same = value.dim() == 0 and bool(
                torch.isclose(loss.detach().to(value), value, rtol=1e-3, equal_nan=True)
            )
            if is_same:
                return None
            return (
                "its value is another" if loss.grad_fn is None else f"its value comes from {self._word(loss.grad_fn)}"
            )
        found = self._beside(loss.grad_fn, edge.node)
        return found or (self._factors(loss, edge, call, value) if value.dim() else None)

    def missing_in(self, loss: Tensor, call: LossCall) -> str | None:
        """Return why a step does not train on every row of a call, whatever else it trains on; ``None`` if it does.

        Args:
            loss: What the step returns, with its graph; a plain tensor.
            call: One of :attr:`calls`.
        """
        edge, value = self._seen[self.calls.index(call)]
        if loss.grad_fn is None:
            return None
        if edge is None or edge.node is None:
            return self.rest_of(loss, call)
        if not self._leading_to(loss.grad_fn, edge.node)[loss.grad_fn]:
            return f"the loss comes from {self._word(loss.grad_fn)}"
        counts = self._factors_of(loss, edge, call, value) != 0 if value.dim() else torch.ones(1)
        return "some of its rows have no part in the loss" if bool(counts.any()) and not bool(counts.all()) else None

    def _beside(self, start: Node, target: Node) -> str | None:
        """Walk from the loss down to the call, and return the first thing that is no multiple of it and no constant."""
        leads = self._leading_to(start, target)
        if not leads[start]:
            return f"it comes from {self._word(start)}"
        waiting, done = [start], {target}
        while waiting:
            node = waiting.pop()
            if node in done:
                continue
            done.add(node)
            following = [child for child, _ in node.next_functions]
            hits = [child is not None and leads.get(child, False) for child in following]
            for child, hit in zip(following, hits, strict=True):
                if child is not None and not hit and not self._is_constant(child):
                    return f"there is also {self._word(child)}"
            if not _is_linear(node, hits):
                return f"it goes through {self._word(node)}"
            waiting += [child for child, hit in zip(following, hits, strict=True) if hit and child is not None]
        return None

    def _leading_to(self, start: Node, target: Node) -> dict[Node, bool]:
        leads = {target: True}
        waiting = [(start, False)]
        while waiting:
            node, is_done = waiting.pop()
            children = [child for child, _ in node.next_functions if child is not None]
            if is_done:
                leads[node] = any(leads.get(child, False) for child in children)
            elif node not in leads:
                leads[node] = False
                waiting.append((node, True))
                waiting += [(child, False) for child in children if child not in leads]
        return leads

    def _is_constant(self, node: Node) -> bool:
        while node not in self._fixed_nodes:
            variable = getattr(node, "variable", None)
            if variable is not None:
                return id(variable) in self._fixed
            children = [child for child, _ in node.next_functions]
            if len(children) != 1 or children[0] is None or _base(node) not in _LINEAR:
                return False
            node = children[0]  # a cast or an expansion of a constant
        return True

    def _factors(self, loss: Tensor, edge: GradientEdge, call: LossCall, value: Tensor) -> str | None:
        """Compare the factors with which the positions of an unreduced loss enter the step's loss."""
        factors = self._factors_of(loss, edge, call, value)
        if not len(factors) or bool(torch.isclose(factors, factors[0], rtol=1e-3, atol=0.0).all()):
            return None
        return "its positions are multiplied by a mask or by weights"

    def _factors_of(self, loss: Tensor, edge: GradientEdge, call: LossCall, value: Tensor) -> Tensor:
        with torch.enable_grad():
            (found,) = torch.autograd.grad(loss.sum(), [edge], retain_graph=True, allow_unused=True)
        return found[call.valid.expand(found.shape) & value.isfinite()]

    def _word(self, node: Node) -> str:
        return self._places.get(node, node.name())


def _is_linear(node: Node, hits: Sequence[bool]) -> bool:
    if isinstance(cast(object, node), torch.autograd.function.BackwardCFunction):
        return False  # a function of somebody's own, whatever it is called
    name = _base(node)
    if name == "Mul":
        return sum(hits) == 1
    if name == "Div":
        return bool(hits[0]) and sum(hits) == 1
    return name in _LINEAR


def _base(node: Node) -> str:
    name: str = node.name().rsplit("::", 1)[-1]
    return name if name == "CopyBackwards" else name.split("Backward")[0]


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def _place() -> str:
    """Return the file and line of the caller outside torch and this package's functions."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").startswith(("torch.", __name__.rpartition(".")[0])):
        frame = frame.f_back
    return "?" if frame is None else f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno}"
