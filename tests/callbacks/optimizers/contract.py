"""The contract entries of this family."""

from __future__ import annotations

from tests.contract.entries import Technique

ENTRIES = [
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
        ),
    ),
    Technique(
        "OptimizerSwap",
        "adafactor",
        arguments={"optimizer": "adafactor", "lr_factor": 10.0},
        neutral={"optimizer": "adamw", "lr_factor": None},  # the class of the module
        broad=False,
    ),
]
