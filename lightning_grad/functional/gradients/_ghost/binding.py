"""How one call of an operation depends on what may be parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_grad.functional.gradients._ghost.contributions import Contribution, Dense

Rows = Callable[[Tensor], Tensor]  # returns a tensor with the samples first, in the type that norms are computed in
Term = Callable[[Tensor, Rows], Contribution]  # takes the gradient of the output


@dataclass(frozen=True)
class Binding:
    """How one call of an operation depends on what may be parameters.

    Args:
        terms: Each such argument with what gives its contribution.
        dims: Takes the shape of the output; returns the dimensions in which samples may lie.
        kept: The other tensors that the contributions are computed from; they must not change until then.
        aliases: Whether the output shares memory with the argument.
        call: What to call in place of the operation, where that is faster with constant parameters.
    """

    terms: Sequence[tuple[Tensor, Term]]
    dims: Callable[[Sequence[int]], Sequence[int]]
    kept: Sequence[Tensor] = ()
    aliases: bool = False
    call: Callable[..., Tensor] | None = None


def all_but(last: int) -> Callable[[Sequence[int]], Sequence[int]]:
    return lambda shape: range(len(shape) - last)


def first(shape: Sequence[int]) -> Sequence[int]:
    return range(min(1, len(shape)))


def given(*terms: tuple[Tensor | None, Term]) -> list[tuple[Tensor, Term]]:
    return [(tensor, term) for tensor, term in terms if tensor is not None]


def flat(tensor: Tensor, rows: Rows) -> Tensor:
    """Return (B, R, features)."""
    split = rows(tensor)
    return split.reshape(split.shape[0], -1, split.shape[-1])


def sum_of_rows(gradient: Tensor, rows: Rows) -> Contribution:
    return Dense(flat(gradient, rows).sum(1))
