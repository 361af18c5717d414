"""One entry a technique: all that the contract suite needs to put it through the eight guarantees.

A new technique is exported, gets its entry here, and is held to everything in this folder.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_grad import callbacks


@dataclass(frozen=True)
class Technique:
    """How the suite builds one configuration of a callback.

    Args:
        name: The exported class.
        variant: What is special about this configuration.
        arguments: Constructor arguments, as YAML could hold them.
        neutral: Arguments that make it do nothing; ``None`` if there are none, with ``no_neutral_because``.
        no_neutral_because: Why it has no neutral setting.
        second: Arguments of a second instance that works beside the first; ``None`` if two make no sense.
        needs_adam: Whether it works with Adam-like optimizers only.
        compile: Whether this configuration gives a compiler something else to trace than its neighbours.
        wrong: Pairs of wrong constructor arguments and a piece of the error.
    """

    name: str
    variant: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    neutral: Mapping[str, Any] | None = None
    no_neutral_because: str = ""
    second: Mapping[str, Any] | None = None
    needs_adam: bool = False
    compile: bool = True
    wrong: tuple[tuple[Mapping[str, Any], str], ...] = ()

    @property
    def class_path(self) -> str:
        """Where YAML finds it."""
        return f"lightning_grad.callbacks.{self.name}"

    def build(self, **changes: Any) -> Any:
        """Make the callback."""
        return getattr(callbacks, self.name)(**{**copy.deepcopy(dict(self.arguments)), **changes})

    def build_neutral(self) -> Any:
        """Make the callback that does nothing."""
        assert self.neutral is not None
        return getattr(callbacks, self.name)(**copy.deepcopy(dict(self.neutral)))

    def __str__(self) -> str:
        return "-".join(part for part in (self.name, self.variant) if part)


_LAYERS = ["encoder.*", "hidden", "mix.w"]
_SPARSE = {"pattern": "1:4", "include": _LAYERS}


def _nm(variant: str, **arguments: Any) -> Technique:
    both = {**_SPARSE, **arguments}
    freezes = arguments.get("recipe") == "step"
    neutral = {**both, "pattern": "4:4", **({"recipe": [[0.0, "4:4"]]} if variant == "schedule" else {})}
    return Technique(
        "NMSparsity",
        variant,
        arguments=both,
        neutral=None if freezes else neutral,
        no_neutral_because="the frozen variance is a change that no pattern takes back" if freezes else "",
        second={**both, "include": ["head"], "name": "head"},
        needs_adam=freezes,
        compile=variant in ("mdgf-exponential", "mdgf-exponential-masked", "sdgf-stepwise"),
        wrong=_NM_WRONG if variant == "mdgf-exponential" else (),
    )


_NM_WRONG: tuple[tuple[Mapping[str, Any], str], ...] = (
    ({"pattern": "5:4"}, "1 <= N <= M"),
    ({"pattern": "2"}, "'2:4'"),
    ({"pattern": "0:4"}, "1 <= N <= M"),
    ({"recipe": "sr-st"}, "Did you mean 'sr-ste'"),
    ({"gradient": "mask"}, "Did you mean 'masked'"),
    ({"recipe": "sr-ste", "gradient": "masked"}, "by definition"),
    ({"dense_fraction": 0.5, "finetune_fraction": 0.5}, "leave no room"),
    ({"dense_fraction": -0.1}, "share of the run"),
    ({"decay": -1.0}, "above 0"),
    ({"recipe": "sdgf-stepwise", "decay": 0.1}, "decay belongs to"),
    ({"mask_every": 0}, "at least 1"),
    ({"sr_ste_lambda": -1.0}, "at least 0"),
    ({"geometric_start": 3}, "power of two"),
    ({"recipe": [[0.5, "3:4"], [0.2, "2:4"]], "pattern": "2:4"}, "rising shares"),
    ({"recipe": [[0.0, "3:4"]], "pattern": "2:4"}, "write the last pattern"),
    ({"recipe": [[0.0, "2:4"]], "pattern": "2:4", "dense_fraction": 0.1}, "says all phases"),
)

TECHNIQUES: list[Technique] = [
    _nm("mdgf-exponential", recipe="mdgf-exponential", dense_fraction=0.1),
    _nm("mdgf-exponential-masked", recipe="mdgf-exponential", gradient="masked"),
    _nm("mdgf-linear", recipe="mdgf-linear", gradient="masked"),
    _nm("sr-ste", recipe="sr-ste", sr_ste_lambda=0.1),
    _nm("ste", recipe="ste", zero_pruned_state=True),
    _nm("step", recipe="step"),
    _nm("sdgf-stepwise", recipe="sdgf-stepwise"),
    _nm("sdgf-geometric", recipe="sdgf-geometric", geometric_start=4),
    _nm("mask-every-4", recipe="mdgf-exponential", mask_every=4),
    _nm("schedule", recipe=[[0.0, "3:4"], [0.4, "1:4"]]),
    _nm("output-axis", recipe="sr-ste", axis="output"),
]
CANONICAL: list[Technique] = [next(t for t in TECHNIQUES if t.name == name) for name in callbacks.__all__]
