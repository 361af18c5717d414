"""The contract entries of this family."""

from __future__ import annotations

from tests.contract.entries import Technique, conditioner

_INF = float("inf")

ENTRIES = [
    conditioner(
        "NormClipping",
        compile=True,
        wrong=(
            ({"max_norm": 0.0}, "max_norm must be above 0"),
            ({"max_norm": {"*": -1.0}}, "max_norm must be above 0"),
            ({"max_norm": float("nan")}, "max_norm must be a number"),
            ({"norm_type": 0.0}, "norm_type must be above 0"),
        ),
    ),
    conditioner("NormClipping", "by-name", {"max_norm": {"encoder.*": 0.1, "*": 0.2}, "norm_type": _INF}, broad=False),
    conditioner(
        "ValueClipping",
        wrong=(({"clip_value": -1.0}, "clip_value must be above 0"),),
    ),
    conditioner(
        "AdaptiveGradientClipping",
        wrong=(({"ratio": 0.0}, "ratio must be above 0"), ({"eps": 0.0}, "eps must be above 0")),
    ),
    conditioner(
        "AutoClip",
        wrong=(
            ({"percentile": 101.0}, "from 0 to 100"),
            ({"window": 0}, "window must be at least 1"),
            ({"window": 10**12}, "window must be at most 1000000"),
        ),
    ),
    conditioner(
        "ZClip",
        wrong=(
            ({"z_threshold": 0.0}, "z_threshold must be above 0"),
            ({"alpha": 1.5}, "alpha must be from 0 to 1"),
            ({"max_norm": -1.0}, "max_norm must be above 0"),
            ({"warmup_steps": 0}, "warmup_steps must be at least 1"),
            ({"eps": -1.0}, "eps must be at least 0"),
            ({"eps": _INF}, "eps must be finite"),
        ),
    ),
    conditioner(
        "LayerwiseClipping",
        wrong=(({"max_norm": 0.0}, "max_norm must be above 0"), ({"per": "modul"}, "Did you mean 'module'")),
    ),
    conditioner("LayerwiseClipping", "weighted", {"max_norm": 0.1, "weighted": True, "per": "parameter"}, broad=False),
    conditioner(
        "LayerwiseNormalization",
        wrong=(
            ({"trust_coefficient": 0.0}, "trust_coefficient must be above 0"),
            ({"trust_coefficient": _INF}, "trust_coefficient must be finite"),
            ({"trust_coefficient": {"*": _INF}}, "trust_coefficient must be finite"),
            ({"max_ratio": 0.0}, "max_ratio must be above 0"),
            ({"per": "layer"}, "per must be"),
        ),
    ),
    conditioner(
        "SpikeClipping",
        together=True,
        wrong=(({"threshold": 0.0}, "threshold must be above 0"), ({"pause": -1}, "pause must be at least 0")),
    ),
    Technique(
        "MomentumReset",
        together=True,
        wrong=(
            ({"every_n_steps": 0}, "every_n_steps must be at least 1"),
            ({"warmup_steps": -1}, "warmup_steps must be at least 0"),
            ({"every_n_steps": 3, "warmup_steps": 3}, "below every_n_steps"),
        ),
    ),
    conditioner(
        "SkipNonFinite",
        together=True,
        compile=True,
        wrong=(
            ({"max_in_row": 0}, "max_in_row must be at least 1"),
            ({"max_warnings": -1}, "max_warnings must be at least 0"),
        ),
    ),
    Technique(
        "SpikeRewind",
        compile=True,
        wrong=(
            ({"window": 0}, "window must be at least 1"),
            ({"copies": 0}, "copies must be at least 1"),
            ({"window": 2, "copies": 3}, "window must be at least copies=3; got 2"),
            ({"factor": 1.0}, "factor must be above 1"),
            ({"max_in_row": 0}, "max_in_row must be at least 1"),
        ),
    ),
    conditioner(
        "GradientNoise",
        together=True,
        wrong=(
            ({"eta": -1.0}, "eta must be at least 0"),
            ({"eta": _INF}, "eta must be finite"),
            ({"decay": -1.0}, "decay must be at least 0"),
            ({"decay": _INF}, "decay must be finite"),
        ),
    ),
    conditioner(
        "GradientCentralization",
        together=True,
    ),
    conditioner("NormalizedGradient", wrong=(({"scope": "layers"}, "Did you mean 'layer'"),)),
    conditioner("NormalizedGradient", "by-layer", {"scope": "layer"}, broad=False),
    Technique(
        "ZLoss",
        wrong=(
            ({"coefficient": -1.0}, "coefficient must be at least 0"),
            ({"coefficient": _INF}, "coefficient must be finite"),
        ),
    ),
]
