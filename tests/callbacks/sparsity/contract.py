"""The contract entries of this family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_grad.callbacks import NMSparsity
from tests.contract.entries import Technique

_LAYERS = ["encoder.*", "hidden", "mix.w"]
_FROZEN = "the frozen variance is a change that no pattern takes back"


def _nm(variant: str, **arguments: Any) -> Technique:
    both = {"pattern": NMSparsity.trial["pattern"], "include": _LAYERS, **arguments}
    dense = {"pattern": "4:4", **({"recipe": [[0.0, "4:4"]]} if variant == "schedule" else {})}
    return Technique(
        "NMSparsity",
        variant,
        arguments=both,
        neutral=_FROZEN if variant == "step" else dense,
        needs_end={},
        second={**both, "include": ["head"], "name": "head"},
        compile=variant in ("mdgf-exponential", "mdgf-exponential-masked", "sdgf-stepwise"),
        broad=variant in ("mdgf-exponential", "sr-ste", "step", "mask-every-4"),
        together=variant == "mdgf-exponential",
        wrong=_WRONG if variant == "mdgf-exponential" else (),
    )


_WRONG: tuple[tuple[Mapping[str, Any], str], ...] = (
    ({"pattern": "5:4"}, "1 <= N <= M"),
    ({"pattern": "2"}, "'2:4'"),
    ({"pattern": "0:4"}, "1 <= N <= M"),
    ({"recipe": "sr-st"}, "Did you mean 'sr-ste'"),
    ({"gradient": "mask"}, "Did you mean 'masked'"),
    ({"recipe": "sr-ste", "gradient": "masked"}, "by definition"),
    ({"dense_fraction": 0.5, "finetune_fraction": 0.5}, "leave no room"),
    ({"dense_fraction": -0.1}, "fraction of the run"),
    ({"decay": -1.0}, "above 0"),
    ({"recipe": "sdgf-stepwise", "decay": 0.1}, "decay belongs to"),
    ({"mask_every_n_steps": 0}, "at least 1"),
    ({"sr_ste_lambda": -1.0}, "at least 0"),
    ({"geometric_start": 3}, "power of two"),
    ({"recipe": [[0.5, "3:4"], [0.2, "2:4"]], "pattern": "2:4"}, "increasing fractions"),
    ({"recipe": [[0.0, "3:4"]], "pattern": "2:4"}, "Set the last pattern"),
    ({"recipe": [[0.0, "2:4"]], "pattern": "2:4", "dense_fraction": 0.1}, "defines all phases"),
)

ENTRIES = [
    _nm("mdgf-exponential", **NMSparsity.trial),
    _nm("mdgf-exponential-masked", recipe="mdgf-exponential", gradient="masked"),
    _nm("mdgf-linear", recipe="mdgf-linear", gradient="masked"),
    _nm("sr-ste", recipe="sr-ste", sr_ste_lambda=0.1),
    _nm("ste", recipe="ste", zero_pruned_state=True),
    _nm("step", recipe="step"),
    _nm("sdgf-stepwise", recipe="sdgf-stepwise"),
    _nm("sdgf-geometric", recipe="sdgf-geometric", geometric_start=4),
    _nm("mask-every-4", recipe="mdgf-exponential", mask_every_n_steps=4),
    _nm("schedule", recipe=[[0.0, "3:4"], [0.4, "1:4"]]),
    _nm("output-axis", recipe="sr-ste", axis="output"),
]
