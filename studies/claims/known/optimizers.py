"""Optimizers against AdamW, each at its own rate of the same grid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_grad.callbacks import OptimizerSwap
from studies.arms import PLAIN, Arm, OfSteps, Use
from studies.claim import Paper
from studies.on_task import OnTask
from studies.tasks import TASKS

TEXT_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
ABOUT = {"images": -0.01, "text": -0.02}  # one point of accuracy, and as many nats as in ``optimizers-characters``
WARMUP = OfSteps(0.05)  # as long as that of the task's own schedule


def arms(**module: Any) -> dict[str, Arm]:
    """Return the optimizers; the rates are those of each optimizer itself, so ``lr_factor`` is 1.

    Args:
        module: Arguments of the module that make its optimizer AdamW.
    """
    own = {name: Arm(Use(OptimizerSwap, name, lr_factor=1.0), module=module) for name in ("adabelief", "adafactor")}
    free = Use(OptimizerSwap, "schedulefree-adamw", {"warmup_steps": WARMUP}, lr_factor=1.0)
    return {
        "adamw": Arm(module=module) if module else PLAIN,
        "lion": Arm(Use(OptimizerSwap, "lion", lr_factor=1.0, wd_factor=5.0), module=module),
        **own,
        "schedulefree": Arm(free, module={**module, "schedule": "constant"}),  # it needs no schedule
    }


# Rates of the low-rank rules: their update is a fourth of Adam's (``scale``), so four times the rate is the same step.
MATRICES = {
    "adamw": PLAIN,
    "muon": Arm(Use(OptimizerSwap, "muon", lr_factor=1.0)),
    "galore": Arm(Use(OptimizerSwap, "galore-adamw", {"rank": 16}, lr_factor=4.0)),
    "frugal": Arm(Use(OptimizerSwap, "frugal", {"density": 0.25}, lr_factor=1.0)),
    "dct-adamw": Arm(Use(OptimizerSwap, "dct-adamw", {"rank": 16}, lr_factor=1.0)),
}


def claim(task: str, table: dict[str, Arm], budget: float) -> OnTask:
    """Return the claim on a task."""
    settings: Mapping[str, Any] = TASKS[task].metric
    return OnTask(
        name=f"optimizers-{task}",
        text="Lion and AdaBelief are better than AdamW, and Adafactor and schedule-free AdamW about as good.",
        margins=dict.fromkeys(("adafactor", "schedulefree"), ABOUT[task]),
        paper=Paper(
            "`OptimizerSwap`",
            "optimizers",
            "Lion and AdaBelief train better than Adam; Adafactor as well in less memory, ScheduleFree without a schedule.",
            "Lion (2302.06675); AdaBelief (2010.07468); Adafactor (1804.04235); The Road Less Scheduled (2405.15682)",
        ),
        table=table,
        arms=tuple(table),
        reference="adamw",
        task=task,
        length=400 if task == "text" else 8,
        rates=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),  # Adafactor's is relative to the weights, so it is larger
        budget=budget,
        **settings,
    )


CLAIMS = (
    claim("images", arms(optimizer="adamw", weight_decay=0.01), 12),
    claim("text", arms(), 24),
    OnTask(
        name="muon-text",
        text="Muon on the matrices of a transformer ends with a lower loss than AdamW.",
        paper=Paper(
            '`OptimizerSwap("muon")`',
            "optimizers",
            "Orthogonalizing the momentum of matrices trains language models in fewer steps than AdamW.",
            "Muon is Scalable for LLM Training (2502.16982)",
        ),
        table=MATRICES,
        arms=("adamw", "muon"),
        reference="adamw",
        task="text",
        length=400,
        rates=TEXT_RATES,
        budget=10,
        **TASKS["text"].metric,
    ),
    OnTask(
        name="low-rank-optimizers-text",
        text="GaLore, FRUGAL and DCT-AdamW end with at most 0.05 nats more loss than AdamW, with a fraction of its state.",
        paper=Paper(
            '`OptimizerSwap("galore-adamw")`, `"frugal"`, `"dct-adamw"`',
            "optimizers",
            "Moments in a small subspace, or for a part of the weights, train almost as well as AdamW with less memory.",
            "GaLore (2403.03507); FRUGAL (2411.07837); SVD-Free Low-Rank Adaptive Gradient Optimization (2505.17967)",
        ),
        table=MATRICES,
        arms=("adamw", "galore", "frugal", "dct-adamw"),
        reference="adamw",
        task="text",
        length=400,
        rates=TEXT_RATES,
        margin=-0.05,
        budget=20,
        **TASKS["text"].metric,
    ),
)
