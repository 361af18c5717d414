"""Whether the loss that a step returns is made of one call of a loss, and of nothing else that depends on the samples."""

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
        # Unlike those of a trace, its constants are all tensors that know no samples, also those without a graph.
        self._record = Record(samples or 1, {id(t): t for t in itertools.chain(module.parameters(), module.buffers())})
        self._seen: list[tuple[GradientEdge | None, Tensor]] = []

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        if len(self.calls) > len(self._seen):
            # As it is now: a step may add to it in place.
            edge = None if result.grad_fn is None else GradientEdge(result.grad_fn, result.output_nr)
            self._seen.append((edge, plain_tensor(result).detach().clone()))
        self._follow(func, args, kwargs or {}, result)
        return result

    def _follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Note which tensors know no samples, and where each node comes from."""
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
                record.constants.pop(id(tensor), None)  # written in place
                continue
            record.constants[id(tensor)] = tensor
            if node is not None:
                record.fixed.add(node)

    def rest_of(self, loss: Tensor, call: LossCall) -> str | None:
        """Return what makes a step's loss more than one call, by the function and the line; ``None`` if nothing does.

        Args:
            loss: What the step returns, with its graph; a plain tensor.
            call: One of :attr:`calls`.
        """
        edge, value = self._seen[self.calls.index(call)]
        if loss.grad_fn is None or edge is None or edge.node is None:
            # Without a graph only the values can be compared: a metric, or a loss inside a reentrant checkpoint.
            if value.dim() == 0 and bool(torch.isclose(loss.detach().to(value), value, rtol=1e-3, equal_nan=True)):
                return None
            how = "is another" if loss.grad_fn is None else f"comes from {self._record.word_for(loss.grad_fn)}"
            return f"its value {how}"
        rest = CallWalk(loss.grad_fn, edge.node, self._record).rest
        if rest is not None or value.dim() == 0:
            return rest
        factors = self._factors(loss, edge, call, value)
        is_mean = not len(factors) or bool(torch.isclose(factors, factors[0], rtol=1e-3, atol=0.0).all())
        return None if is_mean else "its positions are multiplied by a mask or by weights"

    @property
    def nodes(self) -> list[Node]:
        """The nodes of what the calls returned, where these have a graph."""
        return [edge.node for edge, _ in self._seen if edge is not None and edge.node is not None]

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
        if not CallWalk(loss.grad_fn, edge.node, self._record).leads:
            return f"the loss comes from {self._record.word_for(loss.grad_fn)}"
        counts = self._factors(loss, edge, call, value) != 0 if value.dim() else torch.ones(1)
        return "some of its rows have no part in the loss" if bool(counts.any()) and not bool(counts.all()) else None

    @staticmethod
    def _factors(loss: Tensor, edge: GradientEdge, call: LossCall, value: Tensor) -> Tensor:
        """Return the factors with which the positions of an unreduced loss that count enter the step's loss."""
        with torch.enable_grad():
            (found,) = torch.autograd.grad(loss.sum(), [edge], retain_graph=True, allow_unused=True)
        return found[call.valid.expand(found.shape) & value.isfinite()]


class CallWalk(Descent):
    """The way from a loss down to one call, which ends there, whether the call reduces its rows or not.

    Args:
        root: The node of the loss.
        target: The node of what the call returned.
        record: Of the step.

    Attributes:
        rest: What is no multiple of the call and no constant, nearest to the loss; ``None`` if there is none.
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
        """Find out whether a node leads to the call, and is linear in that, with only constants beside it."""
        below = [child for child, _ in node.next_functions]
        if node is self._target:
            return
        hits = [child is not None and self._depends[child] for child in below]
        self._depends[node] = any(hits)
        if not any(hits):
            return
        beside = [child for child, hit in zip(below, hits, strict=True) if child is not None and not hit]
        other = next((child for child in beside if not self._is_constant(child)), None)
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
            node = children[0]  # a cast or an expansion of a constant
        return True
