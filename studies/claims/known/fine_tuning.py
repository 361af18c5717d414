"""What trains few parameters of a pretrained model, and what forgets samples."""

from __future__ import annotations

from lightning_grad.callbacks import SaliencyUnlearning
from studies.arms import Arm, Use
from studies.claim import Paper
from studies.on_task import OnTask
from studies.unlearning import Unlearned

SAMPLES, FORGOTTEN = 500, 50  # few, so the model learns some of them by heart
UNLEARNING = {
    "random labels": Arm(Use(SaliencyUnlearning, range(FORGOTTEN), keep=1.0)),
    "saliency": Arm(Use(SaliencyUnlearning, range(FORGOTTEN), keep=0.5)),
}
CLAIMS: tuple[OnTask, ...] = (
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
