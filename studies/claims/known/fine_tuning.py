"""What trains few parameters of a pretrained model, and what forgets samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_grad.callbacks import LoRA, LowRankFinetuning, SaliencyUnlearning, SparseUpdate
from studies.arms import PLAIN, Arm, Use
from studies.claim import Paper
from studies.on_task import OnTask
from studies.pretrained import FromPretrained
from studies.tasks import TASKS
from studies.unlearning import Unlearned

RANK = {"rank": 4, "alpha": 8.0}
ADAPTED = {
    "full": PLAIN,
    "lora": Arm(Use(LoRA, **RANK)),
    "lora-ga": Arm(Use(LoRA, **RANK, init="ga")),
}


def lora(
    task: str,
    length: int,
    before: int,
    samples: int,
    rates: tuple[float, ...],
    budget: int,
    model: Mapping[str, Any] | None = None,
) -> FromPretrained:
    """Return the claim on a task: it holds if the difference is above 0."""
    return FromPretrained(
        name=f"lora-{task}",
        text="At equal steps, adapters that start from the gradient (LoRA-GA) end better than those of LoRA.",
        paper=Paper(
            "`LoRA(init='ga')`",
            "fine_tuning",
            "Adapters that start from the gradient of the pretrained weights train better in the same number of steps.",
            "LoRA-GA: Low-Rank Adaptation with Gradient Approximation (2407.05000)",
        ),
        table=ADAPTED,
        arms=tuple(ADAPTED),
        reference="lora",
        pairs=[("lora-ga", "lora")],
        task=task,
        change="turned",
        before=before,
        length=length,
        samples=samples,
        model=model or {},
        rates=rates,
        budget=budget,
        **TASKS[task].metric,
    )


ADAM: Mapping[str, Any] = {"optimizer": "adamw", "weight_decay": 0.0}
FIFTH, MOST = 0.2, 0.9  # of the bytes of a dense fit; for its first layer, an image network needs most of them


def sparse(budget: float, rule: str, seed: int = 0) -> Arm:
    """Return an arm that trains layers within a budget."""
    return Arm(Use(SparseUpdate, budget, rule=rule, seed=seed), module=ADAM)


def low_rank(reduction: float, ranks: str, head: str) -> Arm:
    """Return an arm that cuts all weights to their ranks but the head."""
    return Arm(Use(LowRankFinetuning, reduction, ranks=ranks, cut_frozen=True, exclude=[head]))


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
    task: {
        "dense": PLAIN,
        **{f"{each}-{cut}": low_rank(cut / 100, each, head) for cut in (50, 70) for each in ("threshold", "uniform")},
    }
    for task, head in (("text", "*.head"), ("images", "*.8"))
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


CUT = "Without fine-tuning, ranks by one threshold lose less than uniform ranks of the same total."
TUNED = (
    "After fine-tuning, ranks by one threshold, of which only the low ones train, lose less than uniform ranks of the same "
    "total, of which all train."
)
MOST_CUT = ("threshold-70", "uniform-70")
NO_STEP = (1e-12,)  # a rate that changes no weight


def ranks_of(name: str, text: str, task: str, **settings: Any) -> OnTask:
    """Return a claim about ranks: the pretrained model is cut, and trains further on the same data."""
    return FromPretrained(
        name=name,
        text=text,
        paper=THRESHOLD,
        table=RANKS[task],
        reference="uniform-70",
        pairs=[(f"threshold-{share}", f"uniform-{share}") for share in (50, 70)],
        task=task,
        change="none",
        before=300 if task == "text" else 8,
        samples=1000,
        **settings,
        **TASKS[task].metric,
    )


SAMPLES, FORGOTTEN = 500, 50  # few, so the model learns some of them by heart
UNLEARNING = {
    "random labels": Arm(Use(SaliencyUnlearning, range(FORGOTTEN), keep=1.0)),
    "saliency": Arm(Use(SaliencyUnlearning, range(FORGOTTEN), keep=0.5)),
}
CLAIMS: tuple[OnTask, ...] = (
    lora("images", 6, 6, 1000, (0.01, 0.03, 0.1, 0.3), 8),
    lora("text", 80, 250, 2000, (3e-3, 1e-2, 3e-2, 1e-1), 12, {"width": 64, "depth": 2}),
    sparse_updates("turned", "sparse-update-images", "When images are turned"),
    sparse_updates("classes", "sparse-update-classes-images", "When new classes appear"),
    ranks_of("low-rank-cut-images", CUT, "images", arms=tuple(RANKS["images"]), length=1, rates=NO_STEP, budget=2),
    ranks_of("low-rank-cut-text", CUT, "text", arms=tuple(RANKS["text"]), length=1, rates=NO_STEP, budget=8),
    ranks_of(
        "low-rank-finetuning-images", TUNED, "images", arms=MOST_CUT, length=10, rates=(1e-3, 1e-2, 0.03, 0.1), budget=3
    ),
    ranks_of(
        "low-rank-finetuning-text", TUNED, "text", arms=MOST_CUT, length=100, rates=(3e-4, 1e-3, 3e-3, 1e-2), budget=12
    ),
    Unlearned(
        name="unlearning-images",
        text="After forgetting a random tenth of the samples, a mask of salient weights ends closer to a retrained model than "
        "random labels alone.",
        paper=Paper(
            "`SaliencyUnlearning`",
            "fine_tuning",
            "Random labels that move only the salient half of the weights come closest to a model retrained without them.",
            "SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency (2310.12508)",
        ),
        table=UNLEARNING,
        arms=tuple(UNLEARNING),
        reference="random labels",
        samples=SAMPLES,
        forgotten=FORGOTTEN,
        before=16,
        length=8,
        rates=(0.0003, 0.001, 0.003, 0.01, 0.03),
        metric="gap",
        higher=False,
        scale=100,
        unit="%",
        chosen_by="validation_gap",
        budget=2,
    ),
)
