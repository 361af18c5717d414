"""What trains few parameters of a pretrained model, and what forgets samples."""

from __future__ import annotations

from lightning_grad.callbacks import LoRA, SaliencyUnlearning
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


def lora(task: str, length: int, before: int, samples: int, rates: tuple[float, ...], budget: int) -> FromPretrained:
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
        rates=rates,
        budget=budget,
        **TASKS[task].metric,
    )


SAMPLES, FORGOTTEN = 500, 50  # few, so the model learns some of them by heart
UNLEARNING = {
    "random labels": Arm(Use(SaliencyUnlearning, range(FORGOTTEN), keep=1.0)),
    "saliency": Arm(Use(SaliencyUnlearning, range(FORGOTTEN), keep=0.5)),
}
CLAIMS: tuple[OnTask, ...] = (
    lora("images", 6, 6, 1000, (0.003, 0.01, 0.03, 0.1), 8),
    lora("text", 150, 400, 3000, (1e-3, 3e-3, 1e-2, 3e-2), 12),
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
        rates=(0.001, 0.003, 0.01, 0.03),
        metric="gap",
        higher=False,
        scale=100,
        unit="%",
        chosen_by="validation_gap",
        budget=2,
    ),
)
