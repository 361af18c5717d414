"""Finds out by backward passes of single losses where the samples lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_grad.functional.gradients._ghost.graph import Leaf
from lightning_grad.functional.gradients._ghost.layouts import Layout, belongs_to, candidates, has_mass
from lightning_grad.functional.gradients._ghost.tracer import Tracer, Use


def run_backward(outputs: Tensor, ends: Mapping[int, Leaf], retain_graph: bool = False) -> None:
    """Run a backward pass down to all leaves, among them one for each use, and touch no ``.grad``."""
    inputs = [leaf.tensor for leaf in ends.values()]
    with torch.autocast(outputs.device.type, enabled=False):
        torch.autograd.grad(outputs, inputs, torch.ones_like(outputs), retain_graph=retain_graph, allow_unused=True)


def probe_layouts(
    uses: Sequence[Use], tracer: Tracer, losses: Tensor, ends: Mapping[int, Leaf], most: int
) -> list[tuple[Layout | None, bool]]:
    """Return the layout of each use, or None where none fits, and whether the gradients left no doubt.

    Args:
        uses: Those to find out about.
        tracer: What saw them.
        losses: (B,).
        ends: The leaves of the graph.
        most: How many samples to ask at most. An undecided use gets its likeliest layout: if all gradients were zero, it
            contributes nothing anyway.
    """
    samples = len(losses)
    fitting = {id(use): candidates(use.shape, use.dims, samples) for use in uses}
    told: set[int] = set()
    for sample in _probed_samples(samples)[:most]:

        def receive(use: Use, gradient: Tensor, sample: int = sample) -> None:
            layouts = fitting.get(id(use))
            if layouts and has_mass(gradient):
                told.add(id(use))
                fitting[id(use)] = [each for each in layouts if belongs_to(each, gradient, sample, samples)]

        with tracer.listening(receive):
            run_backward(losses[sample], ends, retain_graph=True)
        if all(not layouts or (len(layouts) == 1 and use in told) for use, layouts in fitting.items()):
            break
    found = [fitting[id(use)] for use in uses]
    return [
        (next(iter(layouts), None), len(layouts) == 1 and id(use) in told)
        for use, layouts in zip(uses, found, strict=True)
    ]


def _probed_samples(samples: int) -> list[int]:
    """Return which samples to ask: one from the middle first, where B-major and T-major differ most."""
    spread = [samples // 2, samples - 1, 0, samples // 4, 3 * samples // 4, 1, samples // 3, 2 * samples // 3]
    return list(dict.fromkeys(min(sample, samples - 1) for sample in spread))


def where_samples_meet(uses: Sequence[Use], tracer: Tracer, losses: Tensor, ends: Mapping[int, Leaf]) -> set[int]:
    """Return the identities of those uses in which the losses of two samples depend on one entry of the output."""
    touched: dict[int, Tensor] = {}
    meeting: set[int] = set()
    chosen = {id(use) for use in uses}

    def receive(use: Use, gradient: Tensor) -> None:
        if id(use) not in chosen:
            return
        before = touched.get(id(use), torch.zeros_like(gradient, dtype=torch.bool))
        if bool((before & (gradient != 0)).any()):
            meeting.add(id(use))
        touched[id(use)] = before | (gradient != 0)

    with tracer.listening(receive):
        for loss in losses:
            run_backward(loss, ends, retain_graph=True)
            if meeting == chosen:
                break
    return meeting
