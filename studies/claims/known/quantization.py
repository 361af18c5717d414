"""Weights of few bits: training with rounded weights, and rounding after the training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_grad.callbacks import LearnedRounding, QuantizationAwareTraining
from studies.arms import PLAIN, Arm, Use
from studies.claim import Paper
from studies.on_task import OnTask
from studies.tasks import TASKS

IMAGES: Mapping[str, Any] = TASKS["images"].metric
TRAINED = {
    f"{quantizer}-{bits}": Arm(Use(QuantizationAwareTraining, bits, quantizer=quantizer))
    for bits in (4, 2)
    for quantizer in ("ste", "quest", "statsq")
}
ROUNDED = {
    f"{way}-{bits}": Arm(Use(LearnedRounding, bits, **options))
    for bits in (3, 2)
    for way, options in (("nearest", {"steps": 0}), ("learned", {}))
}
CLAIMS = (
    OnTask(
        name="bits-images",
        text="At 4 and at 2 bits, training with QuEST and with StatsQ is more accurate than with rounding to nearest (STE).",
        paper=Paper(
            "`QuantizationAwareTraining`",
            "quantization",
            "Quantizers fitted to the distribution of the weights train better at few bits than earlier ones.",
            "QuEST (2502.05003); Oscillation-free Quantization (2302.02210)",
        ),
        table={"dense": PLAIN, **TRAINED},
        arms=("dense", *TRAINED),
        reference="dense",
        pairs=[(f"{own}-{bits}", f"ste-{bits}") for bits in (4, 2) for own in ("quest", "statsq")],
        rates=(0.01, 0.03, 0.1, 0.3),
        budget=14,
        **IMAGES,
    ),
    OnTask(
        name="rounding-images",
        text="After a dense training, learned rounding to 3 and to 2 bits is more accurate than rounding to nearest.",
        paper=Paper(
            "`LearnedRounding`",
            "quantization",
            "Learning whether each weight is rounded up or down keeps more accuracy than rounding to nearest.",
            "Up or Down? Adaptive Rounding for Post-Training Quantization (2004.10568)",
        ),
        table={"dense": PLAIN, **ROUNDED},
        arms=("dense", *ROUNDED),
        reference="dense",
        pairs=[(f"learned-{bits}", f"nearest-{bits}") for bits in (3, 2)],
        rates=(0.1,),
        budget=7,
        **IMAGES,
    ),
)
