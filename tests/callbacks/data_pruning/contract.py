"""The contract entries of this family."""

from __future__ import annotations

from tests.contract.entries import Technique

_DOMAINS = {"domains": {"first": [0], "second": [1]}}
_SHARES = (({"prune": 1.0}, "at least 0 and below 1"), ({"prune": -0.1}, "at least 0 and below 1"))
ENTRIES = [
    Technique(
        "DataPruning",
        together=True,
        compile=True,
        wrong=(
            *_SHARES,
            ({"score": "el2m"}, "Did you mean 'el2n'"),
            ({"keep": "hardest"}, "keep must be"),
            ({"select": "css"}, "Did you mean 'ccs'"),
            ({"select": "ccs", "keep": "easy"}, "keep='easy' has no effect"),
            ({"select": "dq", "score": "loss"}, "score has no effect"),
            ({"budget": "epoch"}, "Did you mean 'epochs'"),
            ({"balance": "classes"}, "Did you mean 'class'"),
            ({"epoch": -1}, "epoch must be at least 0"),
            ({"epoch": [3, 1], "prune": [0.1, 0.2]}, "epochs must increase"),
            ({"epoch": [1, 3], "prune": [0.1]}, "one share for each epoch"),
            ({"offset": 0.6}, r"at most prune \(0\.5\)"),
            ({"score": "aum", "epoch": 0}, "at least 1"),
            ({"num_shown": -1}, "num_shown must be at least 0"),
            ({"include": ["head"]}, "include works only with score='less'"),
        ),
    ),
    Technique(
        "DataPruning",
        "less",
        broad=False,
        arguments={"prune": 0.3, "epoch": 1, "score": "less"},
        neutral={"prune": 0.0},
    ),
    Technique(
        "DataPruning",
        "grand-steps",
        arguments={"prune": 0.3, "epoch": 1, "score": "grand", "budget": "steps", "balance": "class"},
        neutral={"prune": 0.0},
    ),
    Technique(
        "DataPruning",
        "forgetting-rounds",
        broad=False,
        arguments={"prune": [0.2, 0.4], "epoch": [1, 3], "score": "forgetting", "loss_index": 0},
        neutral={"prune": 0.0, "epoch": 1},
    ),
    Technique(
        "DataPruning",
        "dq",
        broad=False,
        arguments={"prune": 0.3, "epoch": 1, "select": "dq", "balance": "class"},
        neutral={"prune": 0.0},
    ),
    Technique(
        "InfoBatch",
        compile=True,
        wrong=_SHARES,
    ),
    Technique(
        "GradientNormSampling",
        needs_end={},
        wrong=(({"smooth": 1.5}, "smooth must be from 0 to 1"), ({"seed": -1}, "seed must be at least 0")),
    ),
    Technique(
        "RepeatedRandomSubset",
        wrong=_SHARES,
    ),
    Technique(
        "LossReweighting",
        needs_end={},
        wrong=(
            ({"rule": "lin"}, "rule must be"),
            ({"temperature": 0.0}, "temperature must be above 0"),
            ({"start_temperature": -1.0}, "start_temperature must be above 0"),
            ({"warmup_fraction": 2.0}, "warmup_fraction must be from 0 to 1"),
        ),
    ),
    Technique(
        "CurriculumWeighting",
        wrong=(
            ({"epochs": -1.0}, "epochs must be at least 0"),
            ({"epochs": float("inf")}, "epochs must be finite"),
            ({"score_files": ["missing.npz"]}, "finds no score file 'missing.npz'"),
        ),
    ),
    Technique(
        "DomainReweighting",
        wrong=(
            ({"domains": ["web"]}, "at least two different domains"),
            ({"domains": {"web": [0], "code": [0]}}, "has the index 0, which is also in 'web'"),
            ({"domains": {"web": [0], "code": []}}, "at least one index"),
            ({**_DOMAINS, "eta": -1.0}, "eta must be at least 0"),
            ({**_DOMAINS, "every_n_steps": 0}, "every_n_steps must be at least 1"),
            ({**_DOMAINS, "smoothing": 1.0}, "at least 0 and below 1"),
            ({**_DOMAINS, "floor": 1.5}, "floor must be from 0 to 1"),
            ({**_DOMAINS, "initial": {"first": 0.5, "second": 0.4}}, "with the sum 1"),
        ),
    ),
    Technique(
        "UniformLearning",
        wrong=(({"epoch": 0}, "epoch must be at least 1"), ({"repeats": -1}, "repeats must be at least 0")),
    ),
]
