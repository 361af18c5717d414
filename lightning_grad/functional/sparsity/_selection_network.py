"""Find the N-th largest of M rows with a network of maxima and minima."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


def nth_largest(rows: list[Tensor], n: int) -> Tensor:
    """Return the n-th largest of the rows, elementwise.

    Both halves are sorted. The n-th largest of all is then the maximum over i + j = n of
    min(i-th largest of one half, j-th largest of the other).
    """
    if n == 1:
        return functools.reduce(torch.maximum, rows)
    half = len(rows) // 2
    one, other = _sort(rows[:half]), _sort(rows[half:])
    candidates = []
    for i in range(max(0, n - len(other)), min(n, len(one)) + 1):
        ends = [side[k - 1] for side, k in ((one, i), (other, n - i)) if k > 0]
        candidates.append(functools.reduce(torch.minimum, ends))
    return functools.reduce(torch.maximum, candidates)


def _sort(rows: list[Tensor]) -> list[Tensor]:
    """Sort the rows elementwise in descending order (Batcher's odd-even merge sort)."""
    if len(rows) <= 1:
        return rows
    half = len(rows) // 2
    return _merge(_sort(rows[:half]), _sort(rows[half:]))


def _merge(one: Sequence[Tensor], other: Sequence[Tensor]) -> list[Tensor]:
    if not one or not other:
        return [*one, *other]
    if len(one) == len(other) == 1:
        return [torch.maximum(one[0], other[0]), torch.minimum(one[0], other[0])]
    even, odd = _merge(one[::2], other[::2]), _merge(one[1::2], other[1::2])
    merged = [even[0]]
    for high, low in zip(odd, even[1:], strict=False):
        merged += [torch.maximum(high, low), torch.minimum(high, low)]
    paired = min(len(odd), len(even) - 1)
    return [*merged, *odd[paired:], *even[1 + paired :]]


class Step(NamedTuple):
    """One operation of a network: it reads two rows and writes one."""

    operation: Callable[..., Tensor]
    one: int
    other: int
    result: int


class _Row:
    """Stands for a row while :func:`nth_largest` runs, and records the operations on it."""

    def __init__(self, log: list[_Row], operation: Callable[..., Tensor] | None = None, *operands: _Row) -> None:
        self.operation, self.operands = operation, operands
        log.append(self)
        self.log = log

    @classmethod
    def __torch_function__(cls, operation: Any, _: Any, args: Any = (), kwargs: Any = None) -> _Row:
        return cls(args[0].log, operation, *args)


@functools.cache
def network(n: int, m: int) -> tuple[list[Step], int, int]:
    """Plan :func:`nth_largest` for rows of one block of memory, without the operations that its result does not need.

    Returns:
        tuple: The steps, the number of rows that they use, and the row of the result. The first ``m`` rows are the
        inputs, and no step writes into them.
    """
    log: list[_Row] = []
    inputs = [_Row(log) for _ in range(m)]
    end = nth_largest(inputs, n)  # type: ignore[arg-type]
    needed: set[_Row] = {end}  # type: ignore[arg-type]
    for row in reversed(log):
        if row in needed:
            needed.update(row.operands)
    reads = Counter(operand for row in needed for operand in row.operands)
    place, free, steps = {row: i for i, row in enumerate(inputs)}, list[int](), list[Step]()
    size = m
    for row in log:
        if row.operation is None or row not in needed:
            continue
        one, other = (place[operand] for operand in row.operands)
        reads.subtract(row.operands)
        free += [place[operand] for operand in row.operands if not reads[operand] and place[operand] >= m]
        if not free:
            free, size = [size], size + 1
        place[row] = free.pop()
        steps.append(Step(row.operation, one, other, place[row]))
    return steps, size, place[end]  # type: ignore[index]
