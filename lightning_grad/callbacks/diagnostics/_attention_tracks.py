"""Find the softmaxes that belong to attention, by their input and the use of their result.

Used by ``_logits.py``. A softmax alone is no evidence of attention: metrics, class probabilities
and gates of experts use one too. Attention is a chain: two activations are multiplied (queries and
keys), the product goes through a softmax, and the result is multiplied again (by the values). A
linear layer breaks the chain, because one of its factors is a weight.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

# Operators that multiply, each with the positions of its two factors.
_FACTORS = {
    **dict.fromkeys(("mm", "bmm", "mv", "dot", "linear", "convolution", "_convolution"), (0, 1)),
    **dict.fromkeys(("addmm", "addmv", "baddbmm", "addbmm", "_addmm_activation"), (1, 2)),
}


@dataclass(frozen=True)
class _Mark:
    """The role of a tensor: a weight, a product of two activations, or the softmax of such a product."""

    kind: Literal["weight", "scores", "shares"]
    softmax: int = -1  # number of the softmax that computed the shares


_WEIGHT, _SCORES = _Mark("weight"), _Mark("scores")


class AttentionTracks:
    """Follow products of two activations from operator to operator during one step.

    Marks belong to storages, not to tensors, because autograd puts the result of a view into
    another tensor but keeps its storage.

    Args:
        weights: Parameters and buffers. Other parameters are recognized by their class.
    """

    def __init__(self, weights: Iterable[Tensor] = ()) -> None:
        self.attending: set[int] = set()
        self._marks: dict[int, tuple[StorageWeakRef, _Mark]] = {}  # the reference prevents reuse of the address
        for weight in weights:
            self._set(weight, _WEIGHT)

    def are_scores(self, tensor: Tensor) -> bool:
        """Return True if a tensor is computed from a product of two activations, with no weight in between."""
        return self._mark(tensor) == _SCORES

    def note_softmax(self, number: int, result: Any) -> None:
        """Mark the result of a softmax of scores. Its number enters ``attending`` once the result is multiplied."""
        for tensor in _floating([result]):
            self._set(tensor, _Mark("shares", number))

    def note(self, name: str, given: Sequence[Any], result: Any) -> None:
        """Mark the result of one operator.

        Args:
            name: Name of the operator, without its namespace.
            given: Its positional arguments.
            result: Its result.
        """
        mark = self._product(name, given) if name in _FACTORS else self._inherited(list(_floating(given)))
        for tensor in _floating([result]):
            self._set(tensor, mark)

    def _product(self, name: str, given: Sequence[Any]) -> _Mark | None:
        factors = [self._mark(given[position]) for position in _FACTORS[name]]
        shares = {mark.softmax for mark in factors if mark is not None and mark.kind == "shares"}
        self.attending |= shares
        return None if shares or _WEIGHT in factors else _SCORES

    def _inherited(self, given: Sequence[Tensor]) -> _Mark | None:
        """Return the mark of a result that is computed entry by entry, or is a view or a copy."""
        marks = [self._mark(tensor) for tensor in given]
        activations = [mark for mark in marks if mark is not None and mark.kind != "weight"]
        if activations:
            return next((mark for mark in activations if mark.kind == "shares"), _SCORES)
        return _WEIGHT if marks and all(mark == _WEIGHT for mark in marks) else None

    def _mark(self, tensor: Tensor) -> _Mark | None:
        if isinstance(tensor, nn.Parameter):
            return _WEIGHT
        storage = _storage(tensor)
        return None if storage is None else self._marks.get(storage._cdata, (None, None))[1]

    def _set(self, tensor: Tensor, mark: _Mark | None) -> None:
        storage = _storage(tensor)
        if storage is None:
            return
        if mark is None:
            self._marks.pop(storage._cdata, None)
        else:
            self._marks[storage._cdata] = (StorageWeakRef(storage), mark)  # type: ignore[no-untyped-call]


def _storage(tensor: Tensor) -> Any:
    try:
        return tensor.untyped_storage()
    except (RuntimeError, NotImplementedError):  # sparse tensors and wrappers have no storage
        return None


def _floating(values: Iterable[Any]) -> Iterable[Tensor]:
    """Yield the floating-point tensors among arguments or results, including those in lists."""
    for value in values:
        if isinstance(value, Tensor):
            if value.is_floating_point():
                yield value
        elif isinstance(value, (list, tuple)):
            yield from _floating(value)
