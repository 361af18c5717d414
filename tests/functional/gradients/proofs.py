"""The proof that the terms of a step belong to the samples that they are said to belong to, by running it several times.

Shapes can agree by coincidence: a mean over the batch with as many classes as samples, a batch that a step sorts in numpy.
These functions run a step several times and compare. ``batch_of`` makes the batch of the samples with the given indices,
and ``step`` runs on it and returns the loss with its graph. The module must be in eval mode, and the same in each run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_grad.functional.gradients.terms import Terms
from lightning_grad.functional.gradients.trace import LossTrace

Step = Callable[[Any], Tensor]
BatchOf = Callable[[list[int]], Any]
MakeTrace = Callable[[int], LossTrace]
_TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3}


@dataclass(frozen=True, slots=True, eq=False)
class Proof:
    """What the runs of :func:`prove_terms` showed.

    Attributes:
        terms: The terms of the first run, without their graph; pass them as ``like`` to :meth:`LossTrace.terms` in later
            steps.
        noisy: Whether the step draws random numbers. Then the runs cannot be compared, and nothing else was tested.
        unordered: The terms, as "mean (module.py:31)", whose shares do not follow the samples to another order.
        solo: The loss of each sample in a batch of its own, less the constant, (B,); ``None`` if not measured.
        solo_error: Why a batch of one sample failed.
        sample_loss: Which of ``terms.shares`` and ``terms.own`` is the loss of each sample alone; ``None`` if neither is.
        difference: How far the closer of both is from that, at most.
    """

    terms: Terms
    noisy: bool = False
    unordered: tuple[str, ...] = ()
    solo: Tensor | None = None
    solo_error: str = ""
    sample_loss: Literal["share", "own"] | None = None
    difference: float = float("nan")

    @property
    def is_proven(self) -> bool:
        """Whether each term is shown to belong to the samples it is said to belong to."""
        return not self.noisy and not self.unordered


def prove_terms(
    step: Step, batch_of: BatchOf, indices: Sequence[int], solo: bool = True, make_trace: MakeTrace = LossTrace
) -> Proof:
    """Test the terms of a step: does it repeat, do the shares follow the samples, what is the loss of a sample alone?

    Args:
        step: Runs on a batch and returns the loss.
        batch_of: Makes the batch of the samples with these indices. It runs outside the trace, as a loader does: a trace
            that saw the samples put into another order would follow them, and nothing would be tested.
        indices: The samples of a batch.
        solo: Whether to run batches of one sample too, B more runs.
        make_trace: Makes the trace for a number of samples.

    Returns:
        Proof: What was found.

    Raises:
        InseparableLossError: If the loss cannot be separated at all.

    Example:
        >>> x, w = torch.randn(4, 3), torch.nn.Parameter(torch.randn(3))
        >>> proof = prove_terms(lambda batch: (batch @ w).abs().mean(), x.__getitem__, range(4))
        >>> proof.is_proven, proof.sample_loss
        (True, 'share')
        >>> def sorts(batch):
        ...     batch = torch.tensor(sorted(batch.tolist()))  # out of sight
        ...     return (batch @ w).abs().mean()
        >>> prove_terms(sorts, x.__getitem__, range(4)).is_proven
        False
    """
    indices = list(indices)
    terms = trace_step(step, batch_of(indices), len(indices), make_trace)
    terms.release()  # a proof may be kept for a whole run
    if is_noisy(step, batch_of, indices, make_trace):
        return Proof(terms, noisy=True)
    unordered = unordered_terms(step, batch_of, indices, make_trace)
    if not solo:
        return Proof(terms, unordered=unordered)
    try:
        alone = solo_losses(step, batch_of, indices).to(terms.shares) - terms.constant
    except Exception as error:
        return Proof(terms, unordered=unordered, solo_error=f"{type(error).__name__}: {error}")
    found, difference = sample_loss(terms, alone)
    return Proof(terms, False, unordered, alone, "", found, difference)


def trace_step(step: Step, batch: Any, samples: int, make_trace: MakeTrace = LossTrace, seed: int = 0) -> Terms:
    """Run a step and return its terms; the random streams of torch start from a seed and are put back afterwards.

    Args:
        step: Runs on a batch and returns the loss.
        batch: The batch.
        samples: B.
        make_trace: Makes the trace for a number of samples.
        seed: The seed.
    """
    with _seeded(seed), torch.enable_grad():
        trace = make_trace(samples)
        with trace:
            loss = step(batch)
        return trace.terms(loss)


def is_noisy(step: Step, batch_of: BatchOf, indices: Sequence[int], make_trace: MakeTrace = LossTrace) -> bool:
    """Return whether another seed gives other shares; see :func:`prove_terms` for the arguments."""
    indices = list(indices)
    first, second = (trace_step(step, batch_of(indices), len(indices), make_trace, seed) for seed in (0, 1))
    return not _are_alike(first.shares, second.shares, first)


def unordered_terms(
    step: Step, batch_of: BatchOf, indices: Sequence[int], make_trace: MakeTrace = LossTrace
) -> tuple[str, ...]:
    """Return the terms whose shares do not follow when the same samples come in another order.

    Each term is compared, not their sum. A batch of one sample has no other order, so it proves nothing. See
    :func:`prove_terms` for the arguments.
    """
    order = _other_order(len(indices))
    first = trace_step(step, batch_of(list(indices)), len(indices), make_trace)
    moved = [indices[i] for i in order.tolist()]
    second = trace_step(step, batch_of(moved), len(indices), make_trace)
    before, after = _by_place(first), _by_place(second)
    return tuple(
        place
        for place in {**before, **after}
        if place not in before
        or place not in after
        or not _are_alike(before[place][:, order.to(before[place].device)], after[place], first)
    )


def solo_losses(step: Step, batch_of: BatchOf, indices: Sequence[int]) -> Tensor:
    """Return the loss of each sample in a batch of its own, (B,), constants included."""
    losses = []
    for index in indices:
        with _seeded(0), torch.enable_grad():
            losses.append(step(batch_of([index])).detach().reshape(()))
    return torch.stack(losses)


def sample_loss(terms: Terms, solo: Tensor) -> tuple[Literal["share", "own"] | None, float]:
    """Return which of shares and own means equals the losses of the samples alone, and how far the closer one is off.

    Args:
        terms: Of the batch.
        solo: The losses of its samples in batches of one, less the constant, (B,).
    """
    far = {}
    candidates: dict[Literal["share", "own"], Tensor] = {"share": terms.shares.detach(), "own": terms.own.detach()}
    for name, values in candidates.items():
        if _are_alike(values, solo, terms):
            return name, _distance(values, solo)
        far[name] = _distance(values, solo)
    return None, min(far.values())


def _by_place(terms: Terms) -> dict[str, Tensor]:
    """Return the shares of the terms at each place, (terms, B)."""
    found: dict[str, list[Tensor]] = {}
    for term in terms.terms:
        found.setdefault(str(term), []).append(term.shares.detach())
    return {place: torch.stack(shares) for place, shares in found.items()}


def _other_order(samples: int) -> Tensor:
    """Return an order that moves every sample, and is no rotation: one cycle through all of them, drawn once for all."""
    cycle = torch.randperm(samples, generator=torch.Generator().manual_seed(samples))
    order = torch.empty_like(cycle)
    order[cycle] = cycle.roll(1)
    return order


def _are_alike(a: Tensor, b: Tensor, terms: Terms) -> bool:
    if a.shape != b.shape or not torch.equal(a.isnan(), b.isnan()):
        return False
    scale = a.nan_to_num().abs().max() if a.numel() else 0.0
    return bool(_distance(a, b) <= _TOLERANCES.get(terms.dtype, 5e-2) * float(scale))


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).nan_to_num().abs().max()) if a.numel() else 0.0


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
