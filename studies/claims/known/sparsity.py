"""N:M sparsity: recipes that decay the pruned weights, against SR-STE and STEP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_grad.callbacks import NMSparsity
from studies.arms import PLAIN, Arm, Use
from studies.claim import Paper
from studies.on_task import OnTask
from studies.tasks import TASKS

PAPER = Paper(
    "`NMSparsity`, recipes `mdgf` and `sdgf`",
    "sparsity",
    "Above 80 % zeros, pruning weights gradually keeps more of the quality of transformers than earlier recipes.",
    "Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers (2402.04744)",
)
MDGF, SDGF = "mdgf-exponential", "sdgf-stepwise"
DECAYED = [(arm, "sr-ste") for arm in (MDGF, SDGF)]


def arms(pattern: str) -> dict[str, Arm]:
    """Return the recipes with a pattern."""
    recipes = ("sr-ste", "step", MDGF, SDGF)
    return {"dense": PLAIN, **{recipe: Arm(Use(NMSparsity, pattern, recipe, figure=False)) for recipe in recipes}}


def claim(pattern: str, task: str, rates: tuple[float, ...], budget: float) -> OnTask:
    """Return the claim for a pattern on a task."""
    images = task == "images"
    others = (
        ("sr-ste",) if images else ("sr-ste", "step")
    )  # STEP is about the variance of Adam; images are learned by SGD
    named = " and ".join(map(str.upper, others))
    settings: Mapping[str, Any] = TASKS[task].metric
    return OnTask(
        name=f"sparsity-{pattern.replace(':', '-')}-{task}",
        text=f"At {pattern}, recipes that prune gradually (MDGF, SDGF) end better than {named}.",
        paper=PAPER,
        table=arms(pattern),
        arms=("dense", *others, MDGF, SDGF),
        reference="sr-ste",
        pairs=[(arm, other) for other in others for arm in (MDGF, SDGF)],
        task=task,
        length=8 if images else 400,
        rates=rates,
        budget=budget,
        **settings,
    )


IMAGES, TEXT = (0.003, 0.01, 0.03, 0.1, 0.3), (1e-3, 3e-3, 1e-2, 3e-2)
CLAIMS = (
    claim("1:8", "images", IMAGES, 8),
    claim("1:16", "images", IMAGES, 8),
    claim("1:8", "text", TEXT, 22),
    claim("1:16", "text", TEXT, 22),
    OnTask(
        name="step-1-8-text",
        text="At 1:8, STEP ends with a lower loss than SR-STE under Adam.",
        paper=Paper(
            "`NMSparsity`, recipe `step`",
            "sparsity",
            "With Adam, fixing its second moment after a dense start makes N:M training better than SR-STE.",
            "STEP: Learning N:M Structured Sparsity Masks from Scratch with Precondition (2302.01172)",
        ),
        table=arms("1:8"),
        arms=("sr-ste", "step"),
        reference="sr-ste",
        task="text",
        length=400,
        rates=TEXT,
        budget=7,
        **TASKS["text"].metric,
    ),
)
