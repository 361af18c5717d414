"""The contract entries of this family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_grad.callbacks import LearnedRounding, QuantizationAwareTraining
from tests.contract.entries import Technique

_LAYERS = ["encoder.*", "hidden", "mix.w"]
_WRONG: tuple[tuple[Mapping[str, Any], str], ...] = (
    ({"weight_bits": 9}, "from 1 to 8; got 9"),
    ({"weight_bits": 0}, "from 1 to 8; got 0"),
    ({"weight_bits": 1}, "Use 2 bits"),
    ({"quantizer": "quest2"}, "Did you mean 'quest'"),
    ({"start": 1.0}, "below 1"),
    ({"annealing_start": -0.1}, "at least 0"),
    ({"annealing_start": 0.5, "annealing_width": 0.0}, "above 0"),
    ({"annealing_start": 0.5, "quantizer": "quest"}, "Set hadamard=False"),
    ({"activation_bits": 9}, "activation_bits must be an integer from 1 to 8; got 9"),
    ({"activation_quantizer": "affin"}, "Did you mean 'affine'"),
    ({"freeze_batchnorm_at": 2.0}, "below 1"),
    ({"total_steps": 0}, "at least 1"),
)


def _quantized(variant: str = "", **arguments: Any) -> Technique:
    both = {**QuantizationAwareTraining.trial, "include": _LAYERS, **arguments}
    return Technique(
        "QuantizationAwareTraining",
        variant,
        arguments=both,
        neutral={
            "weight_bits": None,
            "activation_bits": None,
            **({"freeze_batchnorm_at": None} if variant == "annealed" else {}),
        },
        needs_end={"start": 0.5},
        second={**both, "include": ["head"], "name": "head"},
        compile=variant in ("", "quest", "activations"),
        broad=not variant,
        together=not variant,
        wrong=() if variant else _WRONG,
    )


_WRONG_ROUNDING: tuple[tuple[Mapping[str, Any], str], ...] = (
    ({"bits": 1}, "Use 2 bits"),
    ({"bits": 9}, "from 1 to 8; got 9"),
    ({"samples": 0}, "samples must be at least 1"),
    ({"steps": -1}, "steps must be at least 0"),
    ({"strength": 0.0}, "strength must be above 0"),
    ({"outliers": 1.5}, "outliers must be from 0 to 1"),
    ({"outlier_score": "gradiant"}, "Did you mean 'gradient'"),
    ({"seed": -1}, "seed must be at least 0"),
)


def _rounded(variant: str = "", **arguments: Any) -> Technique:
    both = {**LearnedRounding.trial, "include": _LAYERS, **arguments}
    return Technique(
        "LearnedRounding",
        variant,
        arguments=both,
        second={**both, "include": ["head"], "name": "head"},
        compile=not variant,
        broad=not variant,
        wrong=() if variant else _WRONG_ROUNDING,
    )


ENTRIES = [
    _quantized(),
    _quantized("quest", quantizer="quest", weight_bits=2, start=0.3),
    _quantized(
        "annealed", quantizer="statsq", weight_bits=2, annealing_start=0.5, annealing_width=0.1, freeze_batchnorm_at=0.7
    ),
    _quantized("activations", activation_bits=8, start=0.3),
    _rounded(),
    _rounded("outliers", outliers=0.05, blocks=["encoder"]),
]
