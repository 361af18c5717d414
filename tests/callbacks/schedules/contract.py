"""The contract entries of this family."""

from __future__ import annotations

from lightning_grad.callbacks import AccuracyGradientLR
from tests.contract.entries import Technique

_INF = float("inf")
_TRIAL = AccuracyGradientLR.trial

ENTRIES = [
    Technique(
        "AccuracyGradientLR",
        together=True,
        second={**_TRIAL, "monitor": "val_loss", "mode": "min", "name": "second"},
        wrong=(
            ({"mode": "maximum"}, "Did you mean 'max'"),
            ({"window": 0}, "window must be at least 1"),
            ({"cooldown": -1}, "cooldown must be at least 0"),
            ({"factor": 0.0}, "factor must be"),
            ({"factor": 1.5}, "factor must be"),
            ({"min_lr": -1.0}, "min_lr must be at least 0"),
            ({"min_lr": _INF}, "min_lr must be finite"),
            ({"threshold": -_INF}, "threshold must be finite"),
            ({"stop_at": _INF}, "stop_at must be finite"),
            ({"window": 10**12}, "window must be at most 1000000"),
            ({"start_after": -1}, "start_after must be at least 0"),
            ({"policy": "replaced"}, "Did you mean 'replace'"),
            ({"interval": "epochs"}, "Did you mean 'epoch'"),
        ),
    ),
    Technique(
        "AccuracyGradientLR",
        "replace-epoch",
        arguments={**_TRIAL, "policy": "replace", "interval": "epoch"},
        neutral="the module's own schedule is set aside",
        broad=False,
    ),
    Technique(
        "AnnealingLaw",
        needs_end={},
        wrong=(
            ({"decay": 1.0}, "decay must be below 1"),
            ({"decay": -0.1}, "decay must be from 0 to 1"),
            ({"max_band": 0.0}, "max_band must be above 0"),
            ({"refits": -1}, "refits must be at least 0"),
        ),
    ),
]
