"""Try strategies on two forked CPU processes, against DDP."""

from collections.abc import Sequence
from typing import Any

import torch

from lightning_grad.cli.check.memory import can_fork
from lightning_grad.cli.check.outcome import Outcome
from lightning_grad.cli.check.rows import ROUNDS, Row
from lightning_grad.cli.check.sources import ShortProject
from lightning_grad.cli.check.trial import try_out
from lightning_grad.testing import on_ranks

RANKS = 2


def check_forks() -> str:
    """Return why no ranks can be forked; empty if they can."""
    if not can_fork():
        return "Strategies are tried in forked processes, which this system does not have. Use Linux or macOS."
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return (
            "Strategies are tried in forked processes, and CUDA is initialized in this one. Build the module on the CPU, or "
            "drop --strategies."
        )
    return ""


def try_strategy(project: ShortProject, strategy: type[Any], batches: int) -> Row:
    """Return what the trials of a strategy show; each round is compared with one under DDP."""
    row = Row(strategy)
    refusal = check_forks()
    if refusal:
        row.outcome = Outcome("not tried", [refusal])
        return row
    try:
        (rounds, *_) = on_ranks(RANKS, _try_rounds, project, strategy, batches)
    except AssertionError as error:  # a process was killed, or did not end
        row.outcome = Outcome("FAILED", [str(error)])
        return row
    for bare, outcome in rounds:
        if bare.status != "runs":
            row.outcome = Outcome("not tried", [f"DDP itself fails on {RANKS} CPU processes:\n{bare.words[0]}"])
            return row
        row.add(outcome, bare)
    return row


def _try_rounds(project: ShortProject, strategy: type[Any], batches: int) -> Sequence[tuple[Outcome, Outcome]]:
    rounds: list[tuple[Outcome, Outcome]] = []
    while len(rounds) < ROUNDS and all(outcome.status == "runs" for pair in rounds for outcome in pair):
        on_cpu: dict[str, Any] = {"accelerator": "cpu", "devices": RANKS, "strategy": "ddp"}
        bare = try_out(project, None, batches, **on_cpu)
        rounds.append((bare, try_out(project, strategy, batches, **on_cpu) if bare.status == "runs" else bare))
    return rounds
