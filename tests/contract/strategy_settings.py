"""One entry a strategy and variant: all that the contract suite needs to put it through the eight guarantees."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from lightning_grad import strategies
from lightning_grad.testing import make_classifier


@dataclass(frozen=True)
class Scheme:
    """How the suite builds one configuration of a strategy.

    Args:
        name: The exported class.
        variant: What is special about this configuration.
        arguments: Constructor arguments, as YAML could hold them.
        optimizer: Which of the projects' optimizers it trains with.
        neutral: Arguments that make it plain DDP; ``None`` if there are none, with ``no_neutral_because``.
        no_neutral_because: Why it has no neutral setting.
        clips: Whether clipping of what the optimizer gets is refused.
        syncs: Why it waits for the device in a step, if it does.
        wrong: Pairs of wrong constructor arguments and a piece of the error.
    """

    name: str
    variant: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    optimizer: str = "sgd"
    neutral: Mapping[str, Any] | None = None
    no_neutral_because: str = ""
    clips: bool = False
    syncs: str = ""
    wrong: tuple[tuple[Mapping[str, Any], str], ...] = ()

    @property
    def class_path(self) -> str:
        """Where YAML finds it."""
        return f"lightning_grad.strategies.{self.name}"

    def build(self, **changes: Any) -> Any:
        """Make the strategy."""
        return getattr(strategies, self.name)(**{**copy.deepcopy(dict(self.arguments)), **changes})

    def build_neutral(self) -> Any:
        """Make the strategy that is plain DDP."""
        assert self.neutral is not None
        return getattr(strategies, self.name)(**copy.deepcopy(dict(self.neutral)))

    def module(self) -> Any:
        """Make the module that it trains; seeds before it is constructed."""
        return make_classifier(optimizer=self.optimizer)

    def __str__(self) -> str:
        return "-".join(part for part in (self.name, self.variant) if part)


_SHARED_WRONG: tuple[tuple[Mapping[str, Any], str], ...] = (
    ({"min_numel": 0}, "min_numel must be at least 1"),
    ({"residual_policy": "stric"}, "Did you mean 'strict'"),
    ({"timeout": timedelta(0)}, "timeout must be longer than zero"),
)
_DGC_WRONG: tuple[tuple[Mapping[str, Any], str], ...] = (
    ({"ratio": 0.0}, "ratio must be a share of entries"),
    ({"ratio": 1.5}, "ratio must be a share of entries"),
    ({"ratio": float("nan")}, "ratio must be a number; got nan"),
    ({"warmup": "papre"}, "Did you mean 'paper'"),
    ({"warmup": [0.5, 2.0]}, r"warmup\[1\] must be a share"),
    ({"warmup": []}, "warmup must have at least one share; got .*Use None for no warm-up"),
    ({"warmup_steps": 0}, "warmup_steps must be at least 1"),
    ({"correction": "momentun"}, "Did you mean 'momentum'"),
    ({"selector": "sample"}, "Did you mean 'sampled'"),
    ({"value_dtype": "float61"}, "Did you mean 'float16'"),
    ({"local_clip": 0.0}, "local_clip must be above 0; got 0.0"),
    ({"local_clip": float("inf")}, "local_clip must be finite; got inf"),
    ({"layer_ratios": {"head": 2.0}}, r"layer_ratios\['head'\] must be a share"),
    *_SHARED_WRONG,
)
_POWER_WRONG: tuple[tuple[Mapping[str, Any], str], ...] = (
    ({"rank": 0}, "rank must be at least 1"),
    ({"start_step": -1}, "start_step must be at least 0"),
    ({"min_gain": 0.0}, "min_gain must be above 0"),
    ({"min_gain": float("inf")}, "min_gain must be finite; got inf"),
    *_SHARED_WRONG,
)
_WARMUP = {key: value for key, value in strategies.DGCStrategy.trial.items() if key != "ratio"}

SCHEMES: list[Scheme] = [
    Scheme(
        "DGCStrategy",
        arguments=strategies.DGCStrategy.trial,
        neutral={"ratio": 1.0, "min_numel": 1},
        wrong=_DGC_WRONG,
    ),
    Scheme(
        "DGCStrategy",
        "sampled-fp16",
        arguments={
            "ratio": 0.1,
            "selector": "sampled",
            "value_dtype": "float16",
            "warmup": "released",
            "min_numel": 100,
        },
        neutral={"ratio": 1.0, "selector": "sampled", "value_dtype": "float16", "local_clip": 1.0},
        syncs="a threshold from a sample has to be counted before its entries can be taken",
    ),
    Scheme(
        "DGCStrategy",
        "chunk-clipped",
        arguments={
            "ratio": 0.05,
            "warmup": None,
            "selector": "chunk",
            "local_clip": 0.5,
            "momentum_masking": False,
            "layer_ratios": {"hidden": 0.2, "head": 1.0},
            "min_numel": 1,
            "gradient_noise": True,
        },
        neutral={"layer_ratios": {"*": 1.0}},
    ),
    Scheme(
        "DGCStrategy",
        "error-feedback",
        arguments={"ratio": 0.05, "correction": "error_feedback", "exclude": ["encoder.*"], **_WARMUP},
        optimizer="adamw",
        neutral={"ratio": 1.0, "correction": "error_feedback"},
    ),
    Scheme(
        "PowerSGDStrategy",
        arguments=strategies.PowerSGDStrategy.trial,
        neutral={"exclude": ["*"]},
        clips=True,
        wrong=_POWER_WRONG,
    ),
    Scheme(
        "PowerSGDStrategy",
        "dense-start",
        arguments={"rank": 1, "start_step": 2, "exclude": ["mix.w"], "min_numel": 100, "gradient_noise": True},
        optimizer="adamw",
        neutral={"rank": 1000, "min_numel": 1},
        clips=True,
    ),
]
CANONICAL: list[Scheme] = [
    next(scheme for scheme in SCHEMES if scheme.name == name) for name in ("DGCStrategy", "PowerSGDStrategy")
]
