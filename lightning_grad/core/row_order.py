"""Whether rows follow their samples into another order: pure functions of tensors, for ``rehearsal.py``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_grad.functional import LossCall
from lightning_grad.functional.gradients import Terms
from lightning_grad.functional.plain_tensors import plain_tensor
from lightning_grad.utilities.batches import map_tensors


def orders_of(samples: int) -> Iterator[Tensor]:
    """Yield orders of a batch that together show every other order than that of the samples: the first moves each sample.

    An order that does not depend on the data, such as the reverse, shows only if it does not commute with these. No order but
    the samples' own commutes with both, from three samples on.

    Example:
        >>> [order.tolist() for order in orders_of(4)]
        [[1, 2, 3, 0], [2, 1, 3, 0]]
    """
    rolled = torch.arange(samples).roll(-1)
    yield rolled
    if samples > 2:
        yield torch.cat([rolled[:2].flip(0), rolled[2:]])


def follows(before: Tensor, after: Tensor, order: Tensor, tolerance: float = 0.0, floor: float = 0.0) -> bool | None:
    """Return whether rows stand in another order, ``None`` if they are too alike to tell.

    Example:
        >>> rows, order = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1, 2, 0])
        >>> follows(rows, rows[order], order), follows(rows, rows, order)
        (True, False)
        >>> follows(torch.ones(3), torch.ones(3), order) is None
        True
    """
    if before.shape != after.shape:
        return False
    expected = before[order.to(before.device)]
    if not is_close(after, expected, tolerance, floor):
        return False
    return None if is_close(expected, before, tolerance, floor) else True


def is_close(one: Tensor, other: Tensor, tolerance: float, floor: float = 0.0) -> bool:
    """Return whether two tensors are equal, up to what another order of summation may change.

    Args:
        one: Any tensor.
        other: Another.
        tolerance: Relative to an entry, and to the median entry.
        floor: A difference that never counts.

    Example:
        >>> x = torch.tensor([1.0, torch.nan, 100.0])
        >>> is_close(x, x * 1.00001, 1e-3), is_close(x, x.flip(0), 1e-3)
        (True, False)
    """
    one, other = plain_tensor(one), plain_tensor(other)
    if one.shape != other.shape:
        return False
    if not (one.is_floating_point() or one.is_complex()):
        return torch.equal(one, other)
    if one.numel() == 0:
        return True
    size = other.detach().abs().float()
    scale = size[size.isfinite()].median() if bool(size.isfinite().any()) else size.new_zeros(())
    return bool(torch.isclose(one, other, rtol=tolerance, atol=tolerance * float(scale) + floor, equal_nan=True).all())


def same_rows(before: Tensor, after: Tensor, tolerance: float = 0.0, floor: float = 0.0) -> bool | None:
    """Return whether the same rows are there, in whichever order; ``None`` if they are too alike to tell.

    Example:
        >>> rows = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> same_rows(rows, rows.flip(0)), same_rows(rows, rows.T.contiguous())
        (True, False)
    """
    if before.shape != after.shape:
        return False
    one, other = (_one_number(rows).sort().values for rows in (before, after))
    if not is_close(other, one, tolerance, floor):
        return False
    return None if is_close(one, one.flip(0), tolerance, floor) else True


def rows_of_batch(batch: Any, samples: int) -> list[Tensor]:
    """Return copies of the tensors of a batch that have a row for each sample.

    Example:
        >>> rows_of_batch({"x": torch.ones(2, 1), "scale": torch.ones(3)}, 2)
        [tensor([[1.],
                [1.]])]
    """
    found: list[Tensor] = []

    def note(leaf: Tensor) -> Tensor:
        if leaf.layout == torch.strided and leaf.dim() and len(leaf) == samples:
            found.append(leaf.clone())
        return leaf

    map_tensors(batch, note)
    return found


def rows_of_call(call: LossCall) -> dict[str, Tensor]:
    """Return the losses of the positions of each sample, (B, P), and a few numbers that tell what the loss got of it.

    The losses decide. Where all of them are alike, or drawn at random, the rest has to tell the samples apart; targets that
    are positions in the batch, as contrastive losses have them, cannot: they rightly follow no order.
    """
    options = {**call.options, "reduction": "none"}
    positions = getattr(F, call.name)(input=call.input, target=call.target, **options)
    found = {"value": call.rows(positions)}
    for name, value in (("input", call.input), ("target", call.target)):
        if name == "target" and are_positions(call):
            continue
        if value.dim() and len(value) and len(value) % call.samples == 0:
            found[name] = _one_number(value).reshape(call.samples, -1)
    return found


def rows_of_terms(terms: Terms) -> dict[str, Tensor]:
    """Return what the samples contribute to each sum of a loss, (B, sums at that place), by its place in the step.

    Each place is compared, not their sum, in which a small term that does not follow would be lost.
    """
    found: dict[str, list[Tensor]] = {}
    for term in terms.terms:
        found.setdefault(str(term), []).append(term.shares.detach())
    return {place: torch.stack(shares, 1) for place, shares in found.items()}


def are_positions(call: LossCall) -> bool:
    """Return whether each row's target is its own place in the batch."""
    target = call.target
    return call.has_class_indices and torch.equal(target, torch.arange(target.numel()).to(target))


def are_all_positions(call: LossCall) -> bool:
    """Return whether the targets are the places of all rows in the batch, in whichever order: each row is to find another."""
    places = torch.arange(call.target.numel(), device=call.target.device)
    is_square = call.input.dim() == 2 and call.input.shape[-1] == len(places)
    return is_square and torch.equal(call.target.flatten().sort().values, places)


def size_of_input(call: LossCall) -> float:
    """Return how large the numbers are that a loss is computed from; its rounding errors are a part of that."""
    entries = call.input.reshape(-1)
    some = entries[:: max(1, len(entries) // 4096)].abs().float()
    some = some[some.isfinite()]
    return float(some.median()) if len(some) else 0.0


def largest(values: Tensor) -> float:
    """Return the size of the largest entry, not counting nan."""
    return float(values.nan_to_num(0.0).abs().max()) if values.numel() else 0.0


def _one_number(rows: Tensor) -> Tensor:
    """Return one number for each row, which tells rows apart: logits of a vocabulary are too large to be copied often."""
    flat = rows.flatten(1) if rows.dim() > 1 else rows.unsqueeze(1)
    flat = flat.float().nan_to_num(0.0).clamp(-1e4, 1e4)  # masked logits would hide the others
    return flat @ torch.arange(1.0, flat.shape[1] + 1, device=flat.device).cos()
