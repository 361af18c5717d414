"""What several techniques of this family answer to what they work with."""

from __future__ import annotations

from lightning_grad.core.compatibility import Answer, no, yes

COMPILED = yes(
    "Scoring runs compiled modules eagerly. Losses are read, and weighted, inside compiled submodules; weighting breaks the "
    "graph, so `fullgraph=True` fails."
)
CURRENT_WEIGHTS = yes("Samples are looked at with the current weights, not the average.")


def no_weighting(way_out: str) -> Answer:
    """Return that losses cannot be weighted under manual optimization."""
    return no("does not work with {}: the loss is weighted before backward, which comes inside training_step", way_out)
