"""Compatibility entries that several techniques of this family share."""

from lightning_grad.core.compatibility import Answer, no, yes

COMPILED = yes(
    "Scoring runs compiled modules eagerly. Losses inside compiled submodules are read and weighted; weighting "
    "breaks the graph, so `fullgraph=True` fails."
)
CURRENT_WEIGHTS = yes("Scoring uses the current weights, not the average.")


def no_weighting(way_out: str) -> Answer:
    """Return the refusal of manual optimization by a technique that weights losses."""
    return no("does not work with {}: the loss is weighted before backward, which runs inside training_step", way_out)
