"""The contract entries of the strategies."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from lightning_grad.strategies import DGCStrategy
from tests.contract.entries import Scheme

_SHARED_WRONG: tuple[tuple[Mapping[str, Any], str], ...] = (
    ({"min_numel": 0}, "min_numel must be at least 1"),
    ({"residual_policy": "stric"}, "Did you mean 'strict'"),
    ({"timeout": timedelta(0)}, "timeout must be longer than zero"),
)
_ADAPT_WRONG: tuple[tuple[Mapping[str, Any], str], ...] = (
    ({"adapt": "lgrecco"}, "Did you mean 'lgreco'"),
    ({"adapt": "lgreco", "adapt_every": 0}, "adapt_every must be at least 1; got 0"),
    ({"adapt_every": 5}, "adapt_every=5 has no effect without adapt. Set adapt='lgreco', or drop it"),
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
    *_ADAPT_WRONG,
    *_SHARED_WRONG,
)
_POWER_WRONG: tuple[tuple[Mapping[str, Any], str], ...] = (
    ({"rank": 0}, "rank must be at least 1"),
    ({"start_step": -1}, "start_step must be at least 0"),
    ({"min_gain": 0.0}, "min_gain must be above 0"),
    ({"min_gain": float("inf")}, "min_gain must be finite; got inf"),
    *_ADAPT_WRONG,
    *_SHARED_WRONG,
)
_ONE_BIT_WRONG: tuple[tuple[Mapping[str, Any], str], ...] = (
    ({"freeze_step": 0}, "must be estimated before it is frozen; got 0"),
    ({"variance_floor": 0.0}, "variance_floor must be above 0; got 0.0"),
    ({"variance_floor": float("inf")}, "variance_floor must be finite; got inf"),
    ({"local_clip": -1.0}, "local_clip must be above 0; got -1.0"),
    *_SHARED_WRONG,
)
_LOCAL_WRONG: tuple[tuple[Mapping[str, Any], str], ...] = (
    ({"sync_every_n_steps": 0}, "sync_every_n_steps must be at least 1"),
    ({"dense_fraction": 1.5}, "dense_fraction must be from 0 to 1"),
    ({"compression": "top_k"}, "Did you mean 'topk'"),
    ({"ratio": 0.0}, "ratio must be a share of entries"),
    ({"residual_decay": -0.1}, "residual_decay must be from 0 to 1"),
    *_SHARED_WRONG,
)
_WARMUP = {key: value for key, value in DGCStrategy.trial.items() if key != "ratio"}

ENTRIES = [
    Scheme(
        "DGCStrategy",
        wrong=_DGC_WRONG,
    ),
    Scheme(
        "DGCStrategy",
        "sampled-fp16-adapted",
        arguments={
            "ratio": 0.1,
            "selector": "sampled",
            "value_dtype": "float16",
            "warmup": "released",
            "min_numel": 100,
            "adapt": "lgreco_feedback",
        },
        neutral={"ratio": 1.0, "local_clip": 1.0},
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
            "log_noise_scale": True,
        },
        neutral={"layer_ratios": {"*": 1.0}, "local_clip": None, "log_noise_scale": False},
    ),
    Scheme(
        "DGCStrategy",
        "error-feedback",
        arguments={"ratio": 0.05, "correction": "error_feedback", "exclude": ["encoder.*"], **_WARMUP},
        optimizer="adamw",
        neutral={"ratio": 1.0},
    ),
    Scheme(
        "PowerSGDStrategy",
        wrong=_POWER_WRONG,
    ),
    Scheme(
        "PowerSGDStrategy",
        "dense-start-adapted",
        arguments={
            "rank": 2,
            "start_step": 2,
            "exclude": ["mix.w"],
            "min_numel": 100,
            "min_gain": 1.1,
            "log_noise_scale": True,
            "adapt": "lgreco",
            "adapt_every": 3,
        },
        optimizer="adamw",
        neutral={"rank": 1000, "min_numel": 1, "log_noise_scale": False},
    ),
    Scheme(
        "OneBitAdamStrategy",
        optimizer="adamw",
        wrong=_ONE_BIT_WRONG,
    ),
    Scheme(
        "LocalSGDStrategy",
        wrong=_LOCAL_WRONG,
        broad=False,  # DiLoCo with another outer step
    ),
    Scheme(
        "LocalSGDStrategy",
        "dense-then-int8",
        arguments={"sync_every_n_steps": 2, "dense_fraction": 0.3, "compression": "int8", "min_numel": 100},
        optimizer="adamw",
        neutral="that of the first entry turns off the same",
    ),
    Scheme(
        "DiLoCoStrategy",
        wrong=(
            ({"outer_lr": 0.0}, "outer_lr must be above 0; got 0.0"),
            ({"outer_momentum": 1.0}, "outer_momentum must be"),
            *_LOCAL_WRONG,
        ),
    ),
    Scheme(
        "DiLoCoStrategy",
        "topk-overlap",
        arguments={
            "sync_every_n_steps": 2,
            "compression": "topk",
            "ratio": 0.1,
            "residual_decay": 0.9,
            "min_numel": 100,
            "overlap": True,
        },
        optimizer="adamw",
        neutral="that of the first entry turns off the same",
    ),
]
