"""SAM and ASAM against the same optimizer, at equal steps and at equal time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_grad.callbacks import SAM
from studies.arms import PLAIN, Arm, Use
from studies.claim import Paper
from studies.on_task import OnTask
from studies.tasks import TASKS

TABLE = {"plain": PLAIN, "plain-long": Arm(longer=2.0), "sam": Arm(Use(SAM)), "asam": Arm(Use(SAM, adaptive=True))}


def claim(name: str, flip: float) -> OnTask:
    """Return the claim with a share of wrong labels."""
    wrong = f"With {100 * flip:g} % wrong labels, " if flip else ""
    settings: Mapping[str, Any] = TASKS["images"].metric
    return OnTask(
        name=name,
        text=f"{wrong}SAM and ASAM are more accurate than the same optimizer, at equal steps and at equal time.",
        paper=Paper(
            "`SAM`",
            "sharpness",
            "Training toward flat minima raises the accuracy, and makes it robust to wrong labels.",
            "Sharpness-Aware Minimization (2010.01412); ASAM (2102.11600)",
        ),
        table=TABLE,
        arms=tuple(TABLE),
        reference="plain",
        pairs=[(arm, other) for other in ("plain", "plain-long") for arm in ("sam", "asam")],
        flip=flip,
        rates=(0.01, 0.03, 0.1, 0.3),
        budget=11,
        **settings,
    )


CLAIMS = (claim("sharpness-images", 0.0), claim("sharpness-images-wrong-labels", 0.2))
