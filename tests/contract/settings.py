"""One entry a technique: all that the contract suite needs to put it through the eight guarantees.

A new technique is exported, gets its entry here, and is held to everything in this folder. The first entry of a technique is
its ``trial``; it may add names of layers, which ``trial`` leaves out.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_grad import callbacks


@dataclass(frozen=True, eq=False)
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
        observes: Whether it changes nothing in a run in which nothing goes wrong.
        clips: Whether it refuses ``Trainer(gradient_clip_val=...)``.
        decides: Whether it decides at validations. Of a run that resumes behind its last step, Lightning runs nothing, and so
            not the validation that was due there either.
        manual: Whether it works with manual optimization.
        broad: Whether it goes through everything. Another setting of a mechanism that a neighbour covers is held to
            neutrality, resuming, checkpoints and the rest of what its setting could break.
        refuses: Sharding strategies that it refuses.
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
    observes: bool = False
    clips: bool = False
    decides: bool = False
    manual: bool = True
    broad: bool = True
    refuses: tuple[str, ...] = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")
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
_SPARSE = {"pattern": callbacks.NMSparsity.trial["pattern"], "include": _LAYERS}


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
        broad=variant in ("mdgf-exponential", "sr-ste", "step", "mask-every-4"),
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


def _conditioner(
    name: str,
    variant: str = "",
    arguments: Mapping[str, Any] | None = None,
    neutral: Mapping[str, Any] | None = None,
    clips: bool = True,
    elementwise: bool = False,
    compile: bool = False,
    **rest: Any,
) -> Technique:
    """An entry of a technique that changes gradients; it leaves the head to a second instance."""
    arguments = arguments or {}
    return Technique(
        name,
        variant,
        arguments={**arguments, "exclude": ["head"]},
        neutral=neutral,
        second={**arguments, "include": ["head"], "name": "head"},
        compile=compile,
        clips=clips,
        refuses=("DeepSpeedStrategy",) if elementwise else ("DeepSpeedStrategy", "FSDPStrategy"),
        **rest,
    )


_INF = float("inf")
_CLIPPING: list[Technique] = [
    _conditioner(
        "NormClipping",
        compile=True,
        arguments=callbacks.NormClipping.trial,
        neutral={"max_norm": _INF},
        wrong=(
            ({"max_norm": 0.0}, "max_norm must be above 0"),
            ({"max_norm": {"*": -1.0}}, "max_norm must be above 0"),
            ({"max_norm": float("nan")}, "max_norm must be a number"),
            ({"norm_type": 0.0}, "norm_type must be above 0"),
        ),
    ),
    _conditioner("NormClipping", "by-name", {"max_norm": {"encoder.*": 0.1, "*": 0.2}, "norm_type": _INF}, broad=False),
    _conditioner(
        "ValueClipping",
        arguments=callbacks.ValueClipping.trial,
        neutral={"clip_value": _INF},
        elementwise=True,
        wrong=(({"clip_value": -1.0}, "clip_value must be above 0"),),
    ),
    _conditioner(
        "AdaptiveGradientClipping",
        arguments=callbacks.AdaptiveGradientClipping.trial,
        neutral={"ratio": _INF},
        wrong=(({"ratio": 0.0}, "ratio must be above 0"), ({"eps": 0.0}, "eps must be above 0")),
    ),
    _conditioner(
        "AutoClip",
        arguments=callbacks.AutoClip.trial,
        neutral={"percentile": 100.0},
        wrong=(
            ({"percentile": 101.0}, "from 0 to 100"),
            ({"window": 0}, "window must be at least 1"),
            ({"window": 10**12}, "window must be at most 1000000"),
        ),
    ),
    _conditioner(
        "ZClip",
        arguments=callbacks.ZClip.trial,
        neutral={"z_threshold": _INF, "max_norm": None},
        wrong=(
            ({"z_threshold": 0.0}, "z_threshold must be above 0"),
            ({"alpha": 1.5}, "alpha must be from 0 to 1"),
            ({"max_norm": -1.0}, "max_norm must be above 0"),
            ({"warmup_steps": 0}, "warmup_steps must be at least 1"),
            ({"eps": -1.0}, "eps must be at least 0"),
            ({"eps": _INF}, "eps must be finite"),
        ),
    ),
    _conditioner(
        "LayerwiseClipping",
        arguments=callbacks.LayerwiseClipping.trial,
        neutral={"max_norm": _INF},
        wrong=(({"max_norm": 0.0}, "max_norm must be above 0"), ({"per": "modul"}, "Did you mean 'module'")),
    ),
    _conditioner("LayerwiseClipping", "weighted", {"max_norm": 0.1, "weighted": True, "per": "parameter"}, broad=False),
    _conditioner(
        "LayerwiseNormalization",
        arguments=callbacks.LayerwiseNormalization.trial,
        clips=False,
        no_neutral_because="every layer gets the norm of its weights; no coefficient gives it its own",
        wrong=(
            ({"coefficient": 0.0}, "coefficient must be above 0"),
            ({"coefficient": _INF}, "coefficient must be finite"),
            ({"coefficient": {"*": _INF}}, "coefficient must be finite"),
            ({"max_ratio": 0.0}, "max_ratio must be above 0"),
            ({"per": "layer"}, "is none of"),
        ),
    ),
    _conditioner(
        "SpikeClipping",
        arguments=callbacks.SpikeClipping.trial,
        neutral={"threshold": _INF},
        elementwise=True,
        needs_adam=True,
        wrong=(({"threshold": 0.0}, "threshold must be above 0"), ({"pause": -1}, "pause must be at least 0")),
    ),
    Technique(
        "MomentumReset",
        arguments=callbacks.MomentumReset.trial,
        neutral={"every": 10**6},
        needs_adam=True,
        compile=False,
        refuses=("DeepSpeedStrategy",),
        wrong=(
            ({"every": 0}, "every must be at least 1"),
            ({"warmup": -1}, "warmup must be at least 0"),
            ({"every": 3, "warmup": 3}, "below every"),
        ),
    ),
    _conditioner(
        "SkipNonFinite",
        compile=True,
        arguments=callbacks.SkipNonFinite.trial,
        neutral={},
        clips=False,
        observes=True,
        wrong=(({"max_in_row": 0}, "max_in_row must be at least 1"), ({"warnings": -1}, "warnings must be at least 0")),
    ),
    _conditioner(
        "GradientNoise",
        arguments=callbacks.GradientNoise.trial,
        neutral={"eta": 0.0},
        wrong=(
            ({"eta": -1.0}, "eta must be at least 0"),
            ({"eta": _INF}, "eta must be finite"),
            ({"decay": -1.0}, "decay must be at least 0"),
            ({"decay": _INF}, "decay must be finite"),
        ),
    ),
    _conditioner(
        "GradientMonitor",
        compile=True,
        arguments=callbacks.GradientMonitor.trial,
        neutral={"rarely": 1},
        clips=False,
        observes=True,
        wrong=(
            ({"rarely": 0}, "rarely must be at least 1"),
            ({"depth": 0}, "depth must be at least 1"),
            ({"top": -1}, "top must be at least 0"),
        ),
    ),
    _conditioner(
        "GradientCentralization",
        arguments=callbacks.GradientCentralization.trial,
        clips=False,
        no_neutral_because="the mean is taken away whole or not at all",
    ),
]

_SUBSET: dict[str, Any] = {"compile": False, "refuses": ()}
_SHARES = (({"prune": 1.0}, "at least 0 and below 1"), ({"prune": -0.1}, "at least 0 and below 1"))
_DATA: list[Technique] = [
    Technique(
        "DataPruning",
        arguments=callbacks.DataPruning.trial,
        neutral={"prune": 0.0, "epoch": 1},
        manual=False,
        compile=True,
        refuses=(),
        wrong=(
            *_SHARES,
            ({"score": "el2m"}, "Did you mean 'el2n'"),
            ({"keep": "hardest"}, "is none of"),
            ({"select": "css"}, "Did you mean 'ccs'"),
            ({"select": "ccs", "keep": "easy"}, "keep='easy' means nothing"),
            ({"budget": "epoch"}, "Did you mean 'epochs'"),
            ({"balance": "classes"}, "Did you mean 'class'"),
            ({"epoch": -1}, "epoch must be at least 0"),
            ({"epoch": [3, 1], "prune": [0.1, 0.2]}, "epochs that rise"),
            ({"epoch": [1, 3], "prune": [0.1]}, "one share for each epoch"),
            ({"offset": 0.6}, "at most 0.5"),
            ({"score": "aum", "epoch": 0}, "at least 1"),
            ({"show": -1}, "show must be at least 0"),
        ),
    ),
    Technique(
        "DataPruning",
        "grand-steps",
        arguments={"prune": 0.3, "epoch": 1, "score": "grand", "budget": "steps", "balance": "class"},
        neutral={"prune": 0.0, "epoch": 1, "score": "grand"},
        manual=False,
        compile=False,
    ),
    Technique(
        "DataPruning",
        "forgetting-rounds",
        broad=False,
        arguments={"prune": [0.2, 0.4], "epoch": [1, 3], "score": "forgetting", "loss": 0},
        neutral={"prune": 0.0, "epoch": 1, "score": "forgetting"},
        **_SUBSET,
    ),
    Technique(
        "InfoBatch",
        arguments=callbacks.InfoBatch.trial,
        neutral={"prune": 0.0},
        manual=False,
        compile=True,
        refuses=(),
        wrong=_SHARES,
    ),
    Technique(
        "RepeatedRandomSubset",
        arguments=callbacks.RepeatedRandomSubset.trial,
        neutral={"prune": 0.0},
        wrong=_SHARES,
        **_SUBSET,
    ),
    Technique(
        "LossReweighting",
        arguments=callbacks.LossReweighting.trial,
        neutral={"temperature": _INF},
        manual=False,
        wrong=(
            ({"rule": "lin"}, "is none of"),
            ({"temperature": 0.0}, "temperature must be above 0"),
            ({"start_temperature": -1.0}, "start_temperature must be above 0"),
            ({"warmup": 2.0}, "warmup must be from 0 to 1"),
        ),
        **_SUBSET,
    ),
    Technique(
        "UniformLearning",
        arguments=callbacks.UniformLearning.trial,
        neutral={"epoch": 1, "repeats": 0},
        manual=False,
        wrong=(({"epoch": 0}, "epoch must be at least 1"), ({"repeats": -1}, "repeats must be at least 0")),
        **_SUBSET,
    ),
]

_ALWAYS_CUTS = callbacks.AccuracyGradientLR.trial
_ATTACK_WRONG: tuple[tuple[Mapping[str, Any], str], ...] = (
    ({"epsilon": -0.1}, "epsilon must be at least 0"),
    ({"epsilon": _INF}, "epsilon must be finite"),
    ({"norm": "l1"}, "is none of"),
    ({"step_size": 0.0}, "step_size must be above 0"),
    ({"bounds": [1.0, 0.0]}, "least and the largest"),
    ({"mean": 0.5}, "mean and std belong together"),
    ({"mean": 0.5, "std": 0.0}, "std must be above 0"),
    ({"seed": -1}, "seed must be at least 0"),
)
_ADVERSARIAL: list[Technique] = [
    Technique(
        "AccuracyGradientLR",
        arguments=_ALWAYS_CUTS,
        neutral={**_ALWAYS_CUTS, "factor": 1.0},
        second={**_ALWAYS_CUTS, "monitor": "val_loss", "mode": "min", "name": "second"},
        compile=False,
        decides=True,
        refuses=(),
        wrong=(
            ({"mode": "maximum"}, "Did you mean 'max'"),
            ({"window": 0}, "window must be at least 1"),
            ({"quiet": -1}, "quiet must be at least 0"),
            ({"factor": 0.0}, "factor must be"),
            ({"factor": 1.5}, "factor must be"),
            ({"min_lr": -1.0}, "min_lr must be at least 0"),
            ({"min_lr": _INF}, "min_lr must be finite"),
            ({"threshold": -_INF}, "threshold must be finite"),
            ({"reach": _INF}, "reach must be finite"),
            ({"window": 10**12}, "window must be at most 1000000"),
            ({"start_after": -1}, "start_after must be at least 0"),
            ({"policy": "replaced"}, "Did you mean 'replace'"),
            ({"interval": "epochs"}, "Did you mean 'epoch'"),
        ),
    ),
    Technique(
        "AccuracyGradientLR",
        "replace-epoch",
        arguments={**_ALWAYS_CUTS, "policy": "replace", "interval": "epoch"},
        no_neutral_because="the module's own schedule is set aside",
        compile=False,
        decides=True,
        broad=False,
        refuses=(),
    ),
    Technique(
        "AdversarialTraining",
        arguments=callbacks.AdversarialTraining.trial,
        neutral={"epsilon": 0.0},
        manual=False,
        wrong=(
            *_ATTACK_WRONG,
            ({"attack": "fgms"}, "Did you mean 'fgsm'"),
            ({"steps": 3}, "one step"),
            ({"attack": "pgd", "steps": 0}, "steps must be at least 1"),
            ({"clean_fraction": 1.0}, "at least 0 and below 1"),
            ({"warmup_fraction": 1.5}, "warmup_fraction must be from 0 to 1"),
            ({"check_every": 0}, "check_every must be at least 1"),
        ),
    ),
    Technique(
        "AdversarialTraining",
        "pgd-l2",
        arguments={
            "epsilon": 0.5,
            "attack": "pgd",
            "steps": 2,
            "norm": "l2",
            "bounds": [-9.0, 9.0],
            "clean_fraction": 0.25,
            "warmup_fraction": 0.2,
            "check_every": None,
        },
        neutral={"epsilon": 0.0, "attack": "pgd"},
        manual=False,
        compile=False,
        broad=False,
    ),
    Technique(
        "AdversarialEvaluation",
        arguments=callbacks.AdversarialEvaluation.trial,
        neutral={"epsilon": 0.1, "steps": 2},
        second={"epsilon": 0.2, "steps": 1, "name": "second"},
        observes=True,
        wrong=(
            *_ATTACK_WRONG,
            ({"steps": 0}, "steps must be at least 1"),
            ({"restarts": 0}, "restarts must be at least 1"),
            ({"restarts": 2, "random_start": False}, "would repeat one attack"),
            ({"every": 0}, "every must be at least 1"),
            ({"loss": -1}, "loss must be at least 0"),
        ),
    ),
]

TECHNIQUES: list[Technique] = [
    _nm("mdgf-exponential", **callbacks.NMSparsity.trial),
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
    *_CLIPPING,
    *_DATA,
    *_ADVERSARIAL,
]
BROAD: list[Technique] = [technique for technique in TECHNIQUES if technique.broad]
CANONICAL: list[Technique] = [next(t for t in TECHNIQUES if t.name == name) for name in callbacks.__all__]


def build_together() -> list[Any]:
    """Build one technique of each phase, and sparse weights, as a user might list them."""
    names = ("NMSparsity", "SkipNonFinite", "GradientCentralization", "MomentumReset", "SpikeClipping")
    data = ("DataPruning", "AdversarialTraining", "AdversarialEvaluation", "AccuracyGradientLR")
    wanted = (*names, "GradientNoise", "GradientMonitor", *data)
    return [next(t for t in CANONICAL if t.name == name).build() for name in wanted]
