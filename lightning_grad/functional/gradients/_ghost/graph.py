"""Backward passes of single losses: gradients sample by sample, and the layouts of the samples."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_grad.functional.gradients._ghost.contributions import chunks, sum_squares
from lightning_grad.functional.gradients._ghost.layouts import Layout, belongs_to, candidates, has_mass
from lightning_grad.functional.gradients._ghost.tracer import Tracer, Use


def rows_of_jacobian(outputs: Tensor, inputs: Sequence[Tensor], rows: Tensor) -> list[Tensor | None]:
    """Return the gradients of the inputs for each row of output gradients, (rows, *input), batched if possible.

    Args:
        outputs: Any tensor with a graph.
        inputs: Leaf tensors; the result is None for inputs that are not reached.
        rows: Gradients of the outputs, (rows, *outputs).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # operations without a batching rule warn that they are slow
        try:
            found = torch.autograd.grad(
                outputs, inputs, rows, retain_graph=True, allow_unused=True, is_grads_batched=True
            )
            return [None if gradient is None else _dense(gradient) for gradient in found]
        except RuntimeError:  # a kernel or custom function cannot be batched
            pass
    return _one_by_one(outputs, inputs, rows)


def _dense(gradient: Tensor) -> Tensor:
    return gradient if gradient.layout == torch.strided else gradient.to_dense()


def _one_by_one(outputs: Tensor, inputs: Sequence[Tensor], rows: Tensor) -> list[Tensor | None]:
    found = [torch.autograd.grad(outputs, inputs, row, retain_graph=True, allow_unused=True) for row in rows]
    return [
        torch.stack([torch.zeros_like(p) if gradient is None else _dense(gradient) for gradient in gradients])
        for p, gradients in zip(inputs, zip(*found, strict=True), strict=True)
    ]


def squared_norms_by_backward(losses: Tensor, parameters: Sequence[Tensor], entries: int) -> Tensor:
    """Return the squared norms of the gradients of each loss by one backward pass each, (B,), for all operations.

    Args:
        losses: (B,).
        parameters: The leaf tensors.
        entries: Number of entries in memory that one such backward pass needs.
    """
    squares = torch.zeros_like(losses, requires_grad=False)
    for start, stop in chunks(losses, entries):
        rows = torch.zeros(stop - start, len(losses), dtype=losses.dtype, device=losses.device)
        rows[range(stop - start), range(start, stop)] = 1
        for gradient in rows_of_jacobian(losses, parameters, rows):
            if gradient is not None:
                squares[start:stop] += sum_squares(gradient).to(squares.dtype)
    return squares


# Backward passes of single losses show the layouts of the samples.


def probe_layouts(uses: Sequence[Use], tracer: Tracer, most: int) -> list[tuple[Layout | None, bool]]:
    """Return the layout of each use, or None if no layout matches, and whether the gradients determine it uniquely.

    Args:
        uses: The uses to probe.
        tracer: The tracer that recorded them.
        most: Maximum number of samples to probe.
            An undecided use gets its most likely layout; if all its gradients were zero, it contributes nothing anyway.
    """
    samples = len(tracer.losses)
    fitting = {id(use): candidates(use.shape, use.dims, samples) for use in uses}
    reached: set[int] = set()
    for sample in _probed_samples(samples)[:most]:

        def receive(use: Use, gradient: Tensor, sample: int = sample) -> None:
            layouts = fitting.get(id(use))
            if layouts and has_mass(gradient):
                reached.add(id(use))
                fitting[id(use)] = [each for each in layouts if belongs_to(each, gradient, sample, samples)]

        tracer.backward(tracer.losses[sample], receive)
        if all(not layouts or (len(layouts) == 1 and use in reached) for use, layouts in fitting.items()):
            break
    found = [(id(use), fitting[id(use)]) for use in uses]
    return [(next(iter(layouts), None), len(layouts) == 1 and use in reached) for use, layouts in found]


def _probed_samples(samples: int) -> list[int]:
    """Return the samples to probe, starting in the middle, where B-major and T-major layouts differ most."""
    spread = [samples // 2, samples - 1, 0, samples // 4, 3 * samples // 4, 1, samples // 3, 2 * samples // 3]
    return list(dict.fromkeys(min(sample, samples - 1) for sample in spread))


def where_samples_meet(uses: Sequence[Use], tracer: Tracer) -> set[int]:
    """Return the ids of the uses in which the losses of two samples depend on the same entry of the output."""
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

    for loss in tracer.losses:
        tracer.backward(loss, receive)
        if meeting == chosen:
            break
    return meeting
