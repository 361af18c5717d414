"""Check that the loss of a step consists of one call of a loss, plus only terms that do not depend on samples."""

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from lightning_grad.functional.gradients.autograd import Node, kind_of, leaf_of
from lightning_grad.functional.gradients.loss_capture import LossCapture
from lightning_grad.functional.gradients.loss_functions import LossCall
from lightning_grad.functional.gradients.record import Place, Record, place_of
from lightning_grad.functional.gradients.walk import GUARDING, LINEAR, Descent, is_linear
from lightning_grad.functional.plain_tensors import plain_tensor, tensors_in

_FROM_OUTSIDE = (torch.tensor, torch.as_tensor, torch.from_numpy, torch.frombuffer, torch.asarray)


class WholeLossCapture(LossCapture):
    """A capture that can also find other terms in the loss of a step. It is slower, and used for one step only.

    Terms computed from parameters, buffers and constants only, such as hand-written weight decay, are equal for all
    samples and are ignored. To recognize them, every operation of the step is followed.

    Args:
        module: The module that computes the step.
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
        # Unlike in a trace, constants are all tensors that do not depend on samples, even those without a graph.
        self._record = Record(samples or 1, {id(t): t for t in itertools.chain(module.parameters(), module.buffers())})
        self._seen: list[tuple[GradientEdge | None, Tensor]] = []

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        if len(self.calls) > len(self._seen):
            # A copy, because the step may change the result in place.
            edge = None if result.grad_fn is None else GradientEdge(result.grad_fn, result.output_nr)
            self._seen.append((edge, plain_tensor(result).detach().clone()))
        self._follow(func, args, kwargs or {}, result)
        return result

    def _follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Record which tensors do not depend on samples, and where each node was created."""
        record = self._record
        given = tensors_in((args, kwargs))
        results = tensors_in(result)
        from_outside = func in _FROM_OUTSIDE and any(tensor.numel() > 1 for tensor in results)
        is_fixed = not from_outside and all(id(tensor) in record.constants for tensor in given)
        if not is_fixed and func is Tensor.__setitem__:
            record.constants.pop(id(args[0]), None)
        for tensor in results:
            node = tensor.grad_fn
            if node is not None and node not in record.places:
                record.places[node] = place_of(func)
            if not is_fixed:
                record.constants.pop(id(tensor), None)  # it was changed in place
                continue
            record.constants[id(tensor)] = tensor
            if node is not None:
                record.fixed.add(node)

    def rest_of(self, loss: Tensor, call: LossCall) -> str | None:
        """Describe what else a step's loss contains besides a call, with function and line; ``None`` if nothing.

        Args:
            loss: The loss that the step returned, with its graph; a plain tensor.
            call: One of :attr:`calls`.
        """
        edge, value = self._seen[self.calls.index(call)]
        if loss.grad_fn is None or edge is None or edge.node is None:
            # Without a graph (a metric, or a loss inside a reentrant checkpoint) only values can be compared.
            if value.dim() == 0 and bool(torch.isclose(loss.detach().to(value), value, rtol=1e-3, equal_nan=True)):
                return None
            how = "is different" if loss.grad_fn is None else f"comes from {self._record.word_for(loss.grad_fn)}"
            return f"its value {how}"
        rest = CallWalk(loss.grad_fn, edge.node, self._record).rest
        if rest is not None or value.dim() == 0:
            return rest
        factors = self._factors(loss, edge, call, value)
        is_mean = not len(factors) or bool(torch.isclose(factors, factors[0], rtol=1e-3, atol=0.0).all())
        return None if is_mean else "its positions are multiplied by a mask or by weights"

    @property
    def nodes(self) -> list[Node]:
        """The nodes of the results of the calls that have a graph."""
        return [edge.node for edge, _ in self._seen if edge is not None and edge.node is not None]

    def missing_in(self, loss: Tensor, call: LossCall) -> str | None:
        """Explain why a step does not train on every row of a call; ``None`` if it does.

        Args:
            loss: The loss that the step returned, with its graph; a plain tensor.
            call: One of :attr:`calls`.
        """
        edge, value = self._seen[self.calls.index(call)]
        if loss.grad_fn is None:
            return None
        if edge is None or edge.node is None:
            return self.rest_of(loss, call)
        if not CallWalk(loss.grad_fn, edge.node, self._record).leads:
            return f"the loss comes from {self._record.word_for(loss.grad_fn)}"
        counts = self._factors(loss, edge, call, value) != 0 if value.dim() else torch.ones(1)
        return "some of its rows have no part in the loss" if bool(counts.any()) and not bool(counts.all()) else None

    @staticmethod
    def _factors(loss: Tensor, edge: GradientEdge, call: LossCall, value: Tensor) -> Tensor:
        """Return the factors of the positions of an unreduced loss in the step's loss, without ignored positions."""
        with torch.enable_grad():
            (found,) = torch.autograd.grad(loss.sum(), [edge], retain_graph=True, allow_unused=True)
        return found[call.valid.expand(found.shape) & value.isfinite()]


class CallWalk(Descent):
    """Traversal from a loss down to one call, where it ends whether or not the call reduces its rows.

    Args:
        root: The node of the loss.
        target: The node of the result of the call.
        record: The record of the step.

    Attributes:
        rest: Description of the term nearest to the loss that is neither a multiple of the call nor a constant, if any.
        leads: Whether the loss depends on the call.
    """

    def __init__(self, root: Node, target: Node, record: Record) -> None:
        super().__init__(record)
        self._target = target
        self.rest: str | None = None
        self._run(root)
        self.leads = self._depends[root]
        if not self.leads:
            self.rest = f"it comes from {self._record.word_for(root)}"

    def _open(self, node: Node, place: Place) -> Iterable[Node]:
        if node is self._target:
            self._depends[node] = True
            return ()
        return [below for below, _ in node.next_functions if below is not None]

    def _close(self, node: Node) -> None:
        """Determine whether a node depends on the call, is linear in it, and has only constants as other inputs."""
        below = [child for child, _ in node.next_functions]
        if node is self._target:
            return
        hits = [child is not None and self._depends[child] for child in below]
        self._depends[node] = any(hits)
        if not any(hits):
            return
        others = [child for child, hit in zip(below, hits, strict=True) if child is not None and not hit]
        other = next((child for child in others if not self._is_constant(child)), None)
        if other is not None:
            self.rest = f"there is also {self._record.word_for(other)}"
        elif kind_of(node) not in GUARDING and not is_linear(kind_of(node), hits):
            self.rest = f"it goes through {self._record.word_for(node)}"

    def _is_constant(self, node: Node) -> bool:
        while node not in self._record.fixed:
            leaf = leaf_of(node)
            if leaf is not None:
                return id(leaf) in self._record.constants
            children = [child for child, _ in node.next_functions]
            if len(children) != 1 or children[0] is None or kind_of(node) not in LINEAR | GUARDING:
                return False
            node = children[0]  # for example a cast or an expansion of a constant
        return True
