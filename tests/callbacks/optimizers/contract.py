"""The contract entries of this family."""

from __future__ import annotations

from tests.contract.entries import Technique

_INF = float("inf")

ENTRIES = [
    Technique(
        "LayerwiseLearningRateDecay",
        wrong=(({"decay": 0.0}, "decay must be above 0"), ({"decay": 1.5}, "decay must be from 0 to 1")),
    ),
    Technique(
        "Lookahead",
        wrong=(
            ({"k": 0}, "k must be at least 1"),
            ({"alpha": 0.0}, "alpha must be above 0"),
            ({"alpha": 1.5}, "alpha must be from 0 to 1"),
            ({"eval_weights": "slwo"}, "eval_weights must be 'slow' or 'fast'"),
        ),
    ),
    Technique(
        "Lookahead",
        "fast",
        arguments={"k": 4, "eval_weights": "fast"},
        neutral={"alpha": 1.0},
        broad=False,
    ),
    Technique(
        "TrAct",
        wrong=(({"damping": 0.0}, "damping must be above 0"), ({"damping": _INF}, "damping must be finite")),
    ),
    Technique(
        "ZerothOrder",
        wrong=(
            ({"epsilon": 0.0}, "epsilon must be above 0"),
            ({"epsilon": _INF}, "epsilon must be finite"),
            ({"max_derivative": -1.0}, "max_derivative must be above 0"),
            ({"seed": -1}, "seed must be at least 0"),
        ),
    ),
    Technique(
        "OptimizerSwap",
        wrong=(
            ({"optimizer": "lyon"}, "Did you mean 'lion'"),
            ({"optimizer": "torch.optim.AdmW"}, "Did you mean 'AdamW'"),
            ({"optimizer": "lion", "options": {"beta": [0.9, 0.99]}}, "Did you mean 'betas'"),
            ({"optimizer": "lion", "options": {"lr": 0.1}}, "Set lr_factor"),
            ({"optimizer": "lion", "lr_factor": 0.0}, "lr_factor must be above 0"),
            ({"optimizer": "lion", "lr_factor": float("inf")}, "lr_factor must be finite"),
            ({"optimizer": "lion", "wd_factor": -1.0}, "wd_factor must be at least 0"),
            ({"optimizer": "lion", "options": {"weight_decay": -1.0}}, "options: weight_decay must be at least 0"),
            ({"optimizer": "lion", "which": []}, "which must hold at least one index"),
            ({"optimizer": "lion", "include": ["net"]}, "choose matrices, but Lion moves all parameters"),
            ({"optimizer": "dct-adamw", "options": {"rank": 0}}, "rank must be at least 1; got 0"),
            ({"optimizer": "galore-adamw", "options": {"scale": _INF}}, "options: scale must be finite; got inf"),
        ),
    ),
    Technique(  # Muon by hand is in test_matrices.py: its steps are slow on a CPU
        "OptimizerSwap",
        "q-galore",
        arguments={"optimizer": "q-galore", "options": {"rank": 4, "update_gap": 2, "queue": 1}, "lr_factor": 1.0},
        neutral="every rank changes the steps",
        broad=False,
    ),
    Technique(
        "OptimizerSwap",
        "adafactor",
        arguments={"optimizer": "adafactor", "lr_factor": 10.0},
        neutral={"optimizer": "adamw", "lr_factor": None},  # the class of the module
        broad=False,
    ),
]
