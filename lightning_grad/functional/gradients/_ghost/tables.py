"""Rules for lookups in tables."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_grad.functional.gradients._ghost.binding import Binding, Rows, all_but, first, flat
from lightning_grad.functional.gradients._ghost.contributions import Contribution, Scattered


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Binding | None:
    if max_norm is not None or scale_grad_by_freq:  # a sparse gradient is the same gradient
        return None

    def term(gradient: Tensor, rows: Rows) -> Contribution:
        index, added = rows(input).flatten(1), flat(gradient, rows)
        if padding_idx is not None:
            added = added.masked_fill((index == padding_idx % len(weight)).unsqueeze(2), 0)
        return _scattered(index, added, len(weight))

    return Binding([(weight, term)], all_but(1), (input,))


def _scattered(index: Tensor, added: Tensor, table: int) -> Scattered:
    """Return the contribution of rows (B, R, D) to the places (B, R)."""
    sample = torch.arange(len(index), device=index.device).unsqueeze(1).expand_as(index)
    return Scattered(sample.flatten(), index.flatten() % table, added.flatten(0, 1), len(index), table)


def getitem(table: Tensor, index: Any) -> Binding | None:
    """Cover ``table[index]`` for a tensor of row numbers; anything else is a view."""
    if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32):
        return None
    features = table.dim() - 1

    def term(gradient: Tensor, rows: Rows) -> Contribution:
        places, added = rows(index).flatten(1), rows(gradient)
        return _scattered(places, added.reshape(*places.shape, -1), len(table))

    return Binding([(table, term)], all_but(features), (index,))


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Binding | None:
    if max_norm is not None or scale_grad_by_freq or mode == "max" or input.is_nested:
        return None

    def term(gradient: Tensor, rows: Rows) -> Contribution:
        bags = gradient.shape[0]
        bag, index = _bag_of_each(input, offsets, bags), input.reshape(-1) % len(weight)
        share = _shares(index, bag, bags, mode, per_sample_weights, padding_idx, len(weight)).to(gradient.dtype)
        order = rows(torch.arange(bags, device=index.device)).flatten(1)
        sample = torch.empty_like(order.flatten())
        sample[order] = torch.arange(len(order), device=index.device).unsqueeze(1)
        by_bag = torch.empty_like(flat(gradient, rows).flatten(0, 1))
        by_bag[order] = flat(gradient, rows)
        added = by_bag[bag] * share.to(by_bag.dtype).unsqueeze(1)
        return Scattered(sample[bag], index, added, len(order), len(weight))

    kept = [tensor for tensor in (input, offsets, per_sample_weights) if tensor is not None]
    return Binding([(weight, term)], first, kept)


def _bag_of_each(input: Tensor, offsets: Tensor | None, bags: int) -> Tensor:
    if offsets is None:
        return torch.arange(bags, device=input.device).repeat_interleave(input.shape[1])
    positions = torch.arange(len(input), device=input.device)
    return torch.searchsorted(offsets[:bags].to(positions.dtype), positions, right=True) - 1


def _shares(
    index: Tensor,
    bag: Tensor,
    bags: int,
    mode: str,
    weights: Tensor | None,
    padding_idx: int | None,
    table: int,
) -> Tensor:
    """Return by how much each entry of a bag counts."""
    counted = torch.ones_like(index, dtype=torch.float64)
    if padding_idx is not None:
        counted = (index != padding_idx % table).to(torch.float64)
    if weights is not None:
        return counted * weights.detach().reshape(-1)
    if mode == "sum":
        return counted
    return counted / counted.new_zeros(bags).index_add_(0, bag, counted)[bag].clamp(min=1)
