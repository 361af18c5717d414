"""Add a term to the softmax losses of a training step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_grad.functional.gradients.loss_capture import differentiable, in_backward, transformed
from lightning_grad.functional.gradients.loss_functions import LOSSES, bind_arguments, dropped_weight, valid_positions
from lightning_grad.functional.plain_tensors import plain_tensor

_LOG_SOFTMAX = frozenset([F.log_softmax, torch.log_softmax, Tensor.log_softmax, torch.special.log_softmax])
_ADDABLE = ("cross_entropy", "nll_loss")


@dataclass(frozen=True, eq=False)
class SoftmaxCall:
    """A call of a softmax loss with a graph.

    Attributes:
        logits: The logits, with their graph.
        dim: Dimension of the classes.
        is_valid: Function that returns which positions are not ignored, bool, in the shape of the given positions.
    """

    logits: Tensor
    dim: int
    is_valid: Callable[[Tensor], Tensor]


class Added(NamedTuple):
    """What was added to one call: the sum of the terms over its valid positions, and the number of these; detached."""

    total: Tensor
    positions: Tensor


class _LogProbabilities(NamedTuple):
    result: Tensor
    logits: Tensor
    dim: int | None


class AddedTerms(TorchFunctionMode):
    r"""Context that adds a term to every softmax loss of ``torch.nn.functional`` that has a graph.

    .. math::
        L' = L + \frac{1}{|V|} \sum_{p \in V} t_p

    V are the positions that are not ignored. With ``reduction="sum"`` the terms are summed, and with "none" each is
    added to the loss of its position, so masks and means of the step apply to it. Class weights and label smoothing
    do not apply to it. **The value of the loss does not change:** the gradient is that of L', and the call still
    returns L, bitwise.

    Calls of ``cross_entropy`` count, as functions or modules, and of ``nll_loss`` whose input is the result of
    ``log_softmax``.

    Args:
        term: Function (call) -> t, one term for each position; ``None`` to add nothing to this call.

    Attributes:
        added: What was added to each call of the step.
        refused: Reasons why other losses with a graph got no term, in order.
        reached: Whether a backward pass went through a term.

    A loss inside a checkpointed function is not supported: torch raises an error, because the second forward pass runs
    outside the context. A loss inside a compiled function breaks the graph.

    Example:
        >>> logits = torch.zeros(2, 4, requires_grad=True)
        >>> with AddedTerms(lambda call: call.logits.logsumexp(call.dim).square()):
        ...     loss = F.cross_entropy(logits, torch.tensor([0, 1]))
        >>> loss.backward()
        >>> loss.detach(), logits.grad[0]
        (tensor(1.3863), tensor([-0.0284,  0.4716,  0.4716,  0.4716]))
    """

    def __init__(self, term: Callable[[SoftmaxCall], Tensor | None]) -> None:
        super().__init__()
        self._term = term
        self.added: list[Added] = []
        self.refused: list[str] = []
        self.reached = False
        self._log_probabilities: list[_LogProbabilities] = []

    def __enter__(self) -> AddedTerms:
        self.added, self.refused = [], []
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        self._log_probabilities = []
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Runs for every torch function of the step, so calls of other functions must cost only these lookups.
        loss = LOSSES.get(func)
        if loss is not None:
            kwargs = {**(kwargs or {}), **dropped_weight(func, kwargs or {})}
        value = func(*args, **kwargs) if kwargs else func(*args)
        if loss is not None and loss.defaults is not None and not in_backward():
            return self._with_term(loss.name, bind_arguments(loss.defaults, args, kwargs or {}), value)
        if func in _LOG_SOFTMAX:
            logits, dim = _softmax_arguments(*args, **(kwargs or {}))
            self._log_probabilities.append(_LogProbabilities(value, logits, dim))
        return value

    # torch disables the mode while this runs, so calls made here are not intercepted again.
    def _with_term(self, name: str, given: dict[str, Any], value: Tensor) -> Tensor:
        tensors = [v for v in given.values() if isinstance(v, Tensor)]
        if not differentiable(tensors):
            return value
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break()  # the terms are kept in this object, which a compiled graph cannot do
        call = self._call(name, given, transformed(tensors))
        term = None if call is None else self._term(call)
        if call is None or term is None:
            return value
        valid = call.is_valid(term)
        term = term * valid
        total, count = term.sum(), valid.sum().clamp(min=1)
        self.added.append(Added(total.detach(), count))
        reduced = {"none": term, "sum": total}.get(given["reduction"], total / count)
        if not self.reached:
            reduced.register_hook(self._note)  # type: ignore[no-untyped-call]
        return value + (reduced - reduced.detach()).to(value.dtype)

    def _call(self, name: str, given: dict[str, Any], is_transformed: bool) -> SoftmaxCall | None:
        """Return the call of a loss; ``None`` and a note of the reason if nothing can be added to it."""
        logits, dim = given["input"], 1 if given["input"].dim() > 1 else 0
        if is_transformed:
            self.refused.append(f"{name} (called inside a transform of torch.func)")
            return None
        if name == "nll_loss":
            found = next((known for known in self._log_probabilities if known.result is logits), None)
            if found is None or found.dim not in (dim, dim - logits.dim()):
                self.refused.append("nll_loss (its input is not directly the result of log_softmax)")
                return None
            logits = found.logits
        elif name not in _ADDABLE:
            self.refused.append(name)
            return None
        return SoftmaxCall(plain_tensor(logits), dim, lambda positions: valid_positions(name, given, positions))

    def _note(self, _: Tensor) -> None:
        self.reached = True


def _softmax_arguments(input: Tensor, dim: int | None = None, *_: Any, **__: Any) -> tuple[Tensor, int | None]:
    return input, dim
