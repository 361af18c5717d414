"""What trains few parameters of a pretrained model, and what forgets samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_grad.callbacks import LowRankFinetuning, SparseUpdate
from studies.arms import PLAIN, Arm, Use
from studies.claim import Paper
from studies.on_task import OnTask
from studies.pretrained import FromPretrained
from studies.tasks import TASKS

ADAM: Mapping[str, Any] = {"optimizer": "adamw", "weight_decay": 0.0}
FIFTH, MOST = 0.2, 0.9  # of the bytes of a dense fit; for its first layer, an image network needs most of them


def sparse(budget: float, rule: str, seed: int = 0) -> Arm:
    """Return an arm that trains layers within a budget."""
    return Arm(Use(SparseUpdate, budget, rule=rule, seed=seed), module=ADAM)


def low_rank(reduction: float, ranks: str) -> Arm:
    """Return an arm that cuts all weights but the head to their ranks."""
    return Arm(Use(LowRankFinetuning, reduction, ranks=ranks, cut_frozen=True, exclude=["net.head"]))


SPARSE = {
    "dense": Arm(module=ADAM),
    "gain": sparse(FIFTH, "gain"),
    "last": sparse(FIFTH, "last"),
    "random": sparse(FIFTH, "random"),
    "other random": sparse(FIFTH, "random", 1),
    "gain, most": sparse(MOST, "gain"),
    "first, most": sparse(MOST, "first"),
}
RANKS = {
    "dense": PLAIN,
    **{f"{ranks}-{share}": low_rank(share / 100, ranks) for share in (50, 70) for ranks in ("threshold", "uniform")},
}
THRESHOLD = Paper(
    "`LowRankFinetuning`",
    "fine_tuning",
    "Ranks by one threshold on singular values keep more than equal ranks, and training the low-rank weights alone suffices.",
    "From GaLore to WeLore: How Low-Rank Weights Non-uniformly Emerge from Low-Rank Gradients (2407.11239)",
)


def sparse_updates(change: str, name: str, words: str) -> OnTask:
    """Return the claim about the layers that train, for one change of the task."""
    return FromPretrained(
        name=name,
        text=f"{words}, the layers with the largest squared gradients per byte end more accurate than the last, the first or "
        "random ones within the same memory.",
        paper=Paper(
            "`SparseUpdate`",
            "fine_tuning",
            "Training a few well-chosen layers within a small memory is as accurate as training more. The rule is ours.",
            "On-Device Training Under 256KB Memory (2206.15472)",
        ),
        table=SPARSE,
        arms=tuple(SPARSE),
        reference="dense",
        pairs=[*(("gain", other) for other in ("last", "random", "other random")), ("gain, most", "first, most")],
        change=change,
        length=10,
        rates=(3e-3, 1e-2, 3e-2, 1e-1),
        budget=4,
        **TASKS["images"].metric,
    )


CLAIMS: tuple[OnTask, ...] = (
    sparse_updates("turned", "sparse-update-images", "When images are turned"),
    sparse_updates("classes", "sparse-update-classes-images", "When new classes appear"),
    FromPretrained(
        name="low-rank-cut-text",
        text="Without fine-tuning, ranks by one threshold lose less than uniform ranks of the same total.",
        paper=THRESHOLD,
        table=RANKS,
        arms=tuple(RANKS),
        reference="dense",
        pairs=[(f"threshold-{share}", f"uniform-{share}") for share in (50, 70)],
        task="text",
        change="none",
        before=400,
        samples=1000,
        length=1,
        rates=(1e-12,),  # one step that changes nothing
        budget=10,
        **TASKS["text"].metric,
    ),
    FromPretrained(
        name="low-rank-finetuning-text",
        text="After fine-tuning, ranks by one threshold, of which only the low ones train, lose less than uniform ranks of "
        "the same total, of which all train.",
        paper=THRESHOLD,
        table=RANKS,
        arms=("threshold-50", "uniform-50"),
        reference="uniform-50",
        task="text",
        change="none",
        before=400,
        samples=1000,
        length=100,
        rates=(3e-4, 1e-3, 3e-3, 1e-2),
        budget=12,
        **TASKS["text"].metric,
    ),
)
