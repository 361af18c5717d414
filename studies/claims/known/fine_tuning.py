"""What trains few parameters of a pretrained model, and what forgets samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_grad.callbacks import LoRA
from studies.arms import PLAIN, Arm, Use
from studies.claim import Paper
from studies.on_task import OnTask
from studies.pretrained import FromPretrained
from studies.tasks import TASKS

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


CLAIMS: tuple[OnTask, ...] = (
    lora("images", 6, 6, 1000, (0.01, 0.03, 0.1, 0.3), 8),
    lora("text", 80, 250, 2000, (3e-3, 1e-2, 3e-2, 1e-1), 12, {"width": 64, "depth": 2}),
)
