"""Intercept every use of a parameter in a forward pass, and detach the parameters of uses that have a rule."""

import types
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_grad.functional.gradients._ghost.contributions import Binding, Term
from lightning_grad.functional.gradients._ghost.layouts import Layout
from lightning_grad.functional.gradients._ghost.rules import find_binding
from lightning_grad.functional.gradients.autograd import REENTRANT, leaf_of, nodes_of
from lightning_grad.functional.plain_tensors import dressed, plain_tensor, tensors_in

Key = tuple[str, tuple[str, ...], int]  # operation, parameters, number of earlier calls of these


@dataclass
class Source:
    """A parameter, or a tensor computed from parameters only, which therefore does not depend on samples.

    Args:
        tensor: The tensor, with its graph.
        roots: The names of the parameters.
        version: Version of the tensor when found; it is no longer a source after an in-place change.
    """

    tensor: Tensor
    roots: frozenset[str]
    version: int


@dataclass
class Use:
    """One call of an operation with a rule, whose parameters are detached.

    Args:
        key: Identifies the call in all batches.
        terms: The contribution of each parameter, as a function of the output's gradient.
        shape: Shape of the output.
        dims: Dimensions of the output that may contain the samples.
        is_batchless: Whether no input except parameters requires grad: it may not depend on samples.
        kept: Tensors that the contributions need, with their versions.
        node: The node of the output in the autograd graph.
        layout: The layout of the samples, once known.
    """

    key: Key
    terms: list[tuple[Source, Term]]
    shape: tuple[int, ...]
    dims: Sequence[int]
    is_batchless: bool
    kept: list[tuple[Tensor, int]]
    node: Any = None
    layout: Layout | None = None

    @property
    def roots(self) -> frozenset[str]:
        """The names of the parameters to whose gradients the use contributes."""
        return frozenset().union(*(source.roots for source, _ in self.terms))

    def check_unchanged(self) -> None:
        """Raise if a tensor that the gradient needs was changed in place, like autograd."""
        if any(tensor._version != version for tensor, version in self.kept):
            raise RuntimeError(
                f"Per-sample gradient norms need the input of {self.key[0]} with {', '.join(sorted(self.roots))}, but "
                "it was changed in place after the call. Do that operation out of place."
            )

    def release(self) -> None:
        """Release all tensors that were kept, and the graph."""
        self.terms, self.kept, self.node = [], [], None


OnGradient = Callable[[Use, Tensor], None]


@dataclass
class Leaf:
    """A leaf of the graph, and the names of the operations that use it."""

    tensor: Tensor
    users: set[str] = field(default_factory=set)


def leaves(outputs: Tensor) -> dict[int, Leaf]:
    """Return the leaf tensors of the graph of some outputs, by id."""
    found: dict[int, Leaf] = {}
    if outputs.grad_fn is None:
        return {id(outputs): Leaf(outputs)} if outputs.requires_grad else found
    for node in nodes_of(outputs):
        if node.name() == REENTRANT:
            raise RuntimeError(
                "Per-sample gradient norms cannot see into torch.utils.checkpoint.checkpoint(..., use_reentrant=True). "
                "Turn activation checkpointing off while measuring."
            )
        for following, _ in node.next_functions:
            variable = None if following is None else leaf_of(following)
            if variable is not None:
                found.setdefault(id(variable), Leaf(variable)).users.add(node.name())
    return found


class _Root(torch.autograd.Function):
    """Make a tensor require grad, so that the backward pass computes its gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, anchor: Tensor, aliases: bool) -> Tensor:
        if aliases:
            return tensor.view_as(tensor)
        ctx.mark_dirty(tensor)  # the output is then no view, so the module may change it in place
        return tensor

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        return None, None, None


def _transparent(function: Any) -> Any:
    """Return a copy of a torch function that exposes the operations inside it to modes, instead of itself."""
    if not isinstance(function, types.FunctionType):
        return None
    inside = {**function.__globals__, "has_torch_function": lambda _: False}
    copy = types.FunctionType(function.__code__, inside, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_ATTENTION = _transparent(F.multi_head_attention_forward)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


def _is_transformed() -> bool:
    """Return True inside a transform such as ``torch.func.vmap``, where tensors hide their batch dimension."""
    return torch._C._functorch.peek_interpreter_stack() is not None


@dataclass(eq=False)
class Tracer(TorchFunctionMode):
    """Context around a forward pass that records each use of a parameter.

    If a rule covers a use, the operation runs with its parameters detached, so the backward pass computes no gradients
    of weights, and a hook on the output receives the output's gradient. Parameters of all other uses stay in the graph.

    Args:
        parameters: The trainable parameters by name.
        excluded: Names of parameters that are left to autograd.
        batchless: Calls that are equal for all samples, such as the lookup of learned positions.

    Attributes:
        losses: The losses that the forward pass returned, (B,).
        ends: The leaves of their graph, including the anchor of uses without other inputs that require grad.
    """

    parameters: Mapping[str, Tensor]
    excluded: set[str]
    batchless: set[Key]
    uses: list[Use] = field(default_factory=list)
    uncovered: dict[str, set[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self._sources = {id(p): Source(p, frozenset([name]), -1) for name, p in self.parameters.items()}
        self._calls: Counter[tuple[str, tuple[str, ...]]] = Counter()
        self._handles: list[Any] = []
        self._inside = False
        self._on_gradient: OnGradient | None = None
        self.ends: dict[int, Leaf] = {}
        device = next(iter(self.parameters.values())).device
        self.anchor = torch.zeros((), device=device, requires_grad=True)

    def source(self, value: Any) -> Source | None:
        """Return the source for a tensor computed from parameters only, or None for other values."""
        found = self._sources.get(id(value)) if isinstance(value, Tensor) else None
        return found if found is not None and found.version in (-1, found.tensor._version) else None

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            _refuse_batch_statistics(*args, **kwargs)
        if not torch.is_grad_enabled() or _is_transformed():
            return func(*args, **kwargs)
        if func is F.multi_head_attention_forward and _ATTENTION is not None and not self._inside:
            return self._look_inside(_ATTENTION, args, kwargs)
        given = tensors_in((args, kwargs))
        found = [source for source in map(self.source, given) if source is not None]
        if not found:
            return func(*args, **kwargs)
        return self._call(func, args, kwargs, given, found)

    def _look_inside(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        self._inside = True
        try:
            with self:
                return function(*args, **kwargs)
        finally:
            self._inside = False

    def _call(
        self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], given: list[Tensor], found: list[Source]
    ) -> Any:
        """Run an operation that uses sources, by its rule if there is one; otherwise record what autograd must measure."""
        others = [tensor for tensor in given if self.source(tensor) is None]
        binding = None
        if not any(tensor.is_nested or tensor.is_sparse for tensor in given):
            binding = find_binding(func, lambda value: self.source(value) is not None, args, kwargs)
        knows_no_samples = all(tensor.dtype in _INTEGERS for tensor in others)
        # The rule must cover every source among the arguments, or a contribution would be missing.
        if binding is not None and {id(s.tensor) for s in found} <= {id(tensor) for tensor, _ in binding.terms}:
            key = self._key(func, found)
            if key not in self.batchless and (others or binding.aliases or func is Tensor.repeat):
                return self._cut(func, args, kwargs, binding, key, others)
            knows_no_samples = not any(tensor.requires_grad for tensor in others)
        result = func(*args, **kwargs)
        derived = knows_no_samples and self._derive(result, found)
        for name in frozenset().union(*(source.roots for source in found)) if not derived else ():
            if any(tensor.requires_grad for tensor in tensors_in(result)):
                self.uncovered.setdefault(name, set()).add(getattr(func, "__name__", str(func)))
        return result

    def _key(self, func: Any, found: list[Source]) -> Key:
        call = func.__name__, tuple(sorted({name for source in found for name in source.roots}))
        self._calls[call] += 1
        return (*call, self._calls[call] - 1)

    def _cut(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        binding: Binding,
        key: Key,
        others: list[Tensor],
    ) -> Any:
        """Run an operation with its sources detached, and hook its output to receive the gradient."""
        terms = [
            (source, term)
            for tensor, term in binding.terms
            if (source := self.source(tensor)) is not None and not source.roots & self.excluded
        ]
        if not terms or any(source.tensor.is_complex() for source, _ in terms):
            return func(*args, **kwargs)
        constants = {id(source.tensor): source.tensor.detach() for source, _ in terms}
        kept = [(tensor, tensor._version) for tensor in binding.kept]
        named = {name: constants.get(id(value), value) for name, value in kwargs.items()}
        out = (binding.call or func)(*(constants.get(id(value), value) for value in args), **named)
        if not out.requires_grad:  # only the detached sources required grad, so no gradient would reach the hook
            own = plain_tensor(out)  # a class of its own may not allow detach()
            root = _Root.apply(own.detach(), self.anchor, binding.aliases)  # type: ignore[no-untyped-call]
            out = root if own is out else dressed(root, out)
        batchless = not any(tensor.requires_grad for tensor in others)
        use = Use(key, terms, tuple(out.shape), binding.dims(out.shape), batchless, kept, out.grad_fn)
        self.uses.append(use)
        self._handles.append(out.register_hook(lambda gradient: self._receive(use, gradient)))
        return out

    def _receive(self, use: Use, gradient: Tensor) -> None:
        if self._on_gradient is not None:
            self._on_gradient(use, gradient)

    def _derive(self, result: Any, found: list[Source]) -> bool:
        """Record the tensors of a result computed from parameters only; return False if it has no tensors."""
        roots = frozenset().union(*(source.roots for source in found))
        tensors = tensors_in(result)
        for tensor in tensors:
            if tensor.requires_grad and id(tensor) not in self._sources:
                self._sources[id(tensor)] = Source(tensor, roots, tensor._version)
        return bool(tensors)

    def finish(self, losses: Tensor) -> None:
        """Store the losses that the forward pass returned, and the leaves of their graph."""
        self.losses, self.ends = losses, leaves(losses)

    def backward(self, outputs: Tensor, on_gradient: OnGradient, retain_graph: bool = True) -> None:
        """Run a backward pass that passes the gradients of all uses to a function, and changes no ``.grad``."""
        inputs = [leaf.tensor for leaf in self.ends.values()]
        self._on_gradient = on_gradient
        try:
            with torch.autocast(outputs.device.type, enabled=False):
                torch.autograd.grad(
                    outputs, inputs, torch.ones_like(outputs), retain_graph=retain_graph, allow_unused=True
                )
        finally:
            self._on_gradient = None

    def close(self) -> None:
        """Remove the hooks and release all tensors."""
        for handle in self._handles:
            handle.remove()
        for use in self.uses:
            use.release()
        self._handles, self._sources = [], {}


def _refuse_batch_statistics(*args: Any, **kwargs: Any) -> None:
    if kwargs.get("training", args[5] if len(args) > 5 else False):
        raise RuntimeError(
            "Per-sample gradient norms are undefined if batch_norm uses the statistics of the batch, because each loss "
            "then depends on all samples. Call module.eval(), and use BatchNorm layers that track running statistics."
        )
