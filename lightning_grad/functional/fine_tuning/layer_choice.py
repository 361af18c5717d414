"""Choose the layers that train within a memory budget."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from lightning_grad.functional.choices import check_choice

LayerRule = Literal["gain", "first", "last", "random"]
RULES: tuple[LayerRule, ...] = get_args(LayerRule)


@dataclass(frozen=True)
class LayerMemory:
    """What the training of a layer needs and promises.

    Args:
        name: Name of the layer.
        own: Bytes that it needs itself: gradient, optimizer state, and what autograd saves for its own gradient.
        path: Bytes that autograd saves behind the layer so that the gradient of the loss reaches it. Layers share this
            part: an early layer needs it for all of the later ones.
        gain: First-order gain: the sum of the squares of its gradient.
    """

    name: str
    own: int
    path: int
    gain: float


def needed_bytes(layers: Sequence[LayerMemory]) -> int:
    """Return the bytes that the training of several layers needs: their own, and the longest path.

    Example:
        >>> needed_bytes([LayerMemory("early", own=10, path=50, gain=0.0), LayerMemory("late", own=5, path=20, gain=0.0)])
        65
    """
    return sum(layer.own for layer in layers) + max((layer.path for layer in layers), default=0)


def choose_layers(
    layers: Sequence[LayerMemory], budget: float, rule: LayerRule = "gain", seed: int = 0
) -> list[LayerMemory]:
    r"""Choose the layers that train within a memory budget.

    A step of gradient descent with learning rate :math:`\eta` lowers the loss by :math:`\eta \lVert g_l \rVert^2` for each
    trained layer :math:`l`, to first order. ``"gain"`` looks for the layers with the largest sum of these gains:

    .. math::
        \max_S \sum_{l \in S} \lVert g_l \rVert^2 \quad \text{with} \quad \sum_{l \in S} b_l + \max_{l \in S} p_l \le B

    where :math:`b_l` are the bytes of the layer itself and :math:`p_l` those of the path to it. For every longest path, it
    takes the layers with the largest gain per byte until the budget is used, and keeps the best of these choices. This rule
    is ours. "On-Device Training Under 256KB Memory" searches offline, by the accuracy that each layer alone adds.

    Args:
        layers: The layers, in the order in which the network calls them.
        budget: B, in bytes.
        rule: "gain"; "first" or "last" for as many layers as fit, from the first or the last one on; "random" for layers in
            a random order, each if it still fits.
        seed: Seed of "random".

    Returns:
        list: The chosen layers in the given order; empty if none fits.

    Raises:
        ValueError: If there is no such rule.

    Example:
        >>> early, late = LayerMemory("early", 10, 50, gain=9.0), LayerMemory("late", 5, 20, gain=1.0)
        >>> [layer.name for layer in choose_layers([early, late], budget=65)]
        ['early', 'late']
        >>> [layer.name for layer in choose_layers([early, late], budget=62)]
        ['early']
        >>> [layer.name for layer in choose_layers([early, late], budget=62, rule="last")]
        ['late']

    References:
        Lin et al., "On-Device Training Under 256KB Memory", NeurIPS 2022, arXiv 2206.15472 (sparse update).
    """
    check_choice(rule, RULES, "rule")
    if rule == "gain":
        ranked = sorted(
            (layer for layer in layers if layer.gain > 0), key=lambda layer: -layer.gain / max(layer.own, 1)
        )
        chosen = _best(ranked, budget)
    elif rule == "random":
        chosen = _fitting(random.Random(seed).sample(list(layers), len(layers)), budget)
    else:
        chosen = _fitting(layers if rule == "first" else layers[::-1], budget, skip=False)
    names = {layer.name for layer in chosen}
    return [layer for layer in layers if layer.name in names]


def _best(ranked: Sequence[LayerMemory], budget: float) -> list[LayerMemory]:
    """Return the best of the greedy choices for each longest path."""
    most, longest, limit = 0.0, 0, 0.0
    for path in sorted({layer.path for layer in ranked if layer.own + layer.path <= budget}):
        gain, own = 0.0, path  # without function calls: this loop runs once for each pair of layers
        for layer in ranked:
            if layer.path <= path and own + layer.own <= budget:
                own += layer.own
                gain += layer.gain
        if gain > most:
            most, longest, limit = gain, path, budget - path
    return _fitting([replace(layer, path=0) for layer in ranked if layer.path <= longest], limit) if most else []


def _fitting(ordered: Sequence[LayerMemory], budget: float, skip: bool = True) -> list[LayerMemory]:
    """Take layers in their order while they fit; ``skip`` continues behind a layer that does not."""
    chosen: list[LayerMemory] = []
    own, path = 0, 0
    for layer in ordered:
        longer = layer.path if layer.path > path else path
        if own + layer.own + longer <= budget:
            chosen.append(layer)
            own, path = own + layer.own, longer
        elif not skip:
            break
    return chosen
