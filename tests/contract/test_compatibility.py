"""G6: what a technique declares is true. Every "no" raises before the first batch, every "yes" is run by a test."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from lightning_grad.core.compatibility import Answer
from lightning_grad.strategies import DGCStrategy, DiLoCoStrategy
from lightning_grad.testing import fit, make_classifier, make_trainer, on_ranks
from lightning_grad.testing.checks import CHECKS
from tests.contract import settings, strategy_settings
from tests.contract import test_composition as composition
from tests.contract import test_fully_sharded as fully_sharded
from tests.contract import test_guarantees as guarantees
from tests.contract import test_strategies_composition as strategies_composition
from tests.contract.entries import Entry, Scheme, Technique
from tests.contract.settings import BROAD
from tests.contract.test_composition import start_of
from tests.strategies.fits import train_on_ranks

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.*the term gets no momentum and is weaker by a factor of 1 / .1 - momentum."),
]


class Complex(nn.Module):
    """Adds a number that a complex parameter decides."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((32,), 0.1 + 0.2j))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale.abs().square()


class Sparse(nn.Module):
    """Adds a row of an embedding with sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 32, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table(torch.zeros(len(x), dtype=torch.long))


# A run that has one thing: its module, and the arguments of its Trainer.

Situation = tuple[Any, dict[str, Any]]


def _stand_in(name: str, **attributes: Any) -> Situation:
    kind = type(name, (pl.strategies.SingleDeviceStrategy,), attributes)
    return make_classifier(), {"strategy": kind(device=torch.device("cpu"))}


def _with_optimizer(module: Any, make: Callable[[Any], torch.optim.Optimizer], **arguments: Any) -> Situation:
    module.configure_optimizers = lambda: make(module)
    return module, arguments


def _scaled() -> dict[str, Any]:
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))]}


def _fused(entry: Entry) -> Situation:
    return _with_optimizer(make_classifier(), lambda m: torch.optim.AdamW(m.parameters(), fused=True), **_scaled())


def _compiled(entry: Entry) -> Situation:
    module = make_classifier()
    torch._dynamo.reset()
    module.hidden.compile(backend="eager")
    return module, {}


def _sparse(entry: Entry) -> Situation:
    module = make_classifier()
    module.norm = nn.Sequential(module.norm, Sparse())
    if entry.works_with.no_second_moment.is_no:
        return _with_optimizer(module, lambda m: torch.optim.SparseAdam(m.norm[1].parameters()))
    return _with_optimizer(module, lambda m: torch.optim.SGD(m.parameters(), lr=0.1))


def _complex(entry: Entry) -> Situation:
    module = make_classifier()
    module.norm = nn.Sequential(module.norm, Complex())
    return module, {}


SITUATIONS: Mapping[str, Callable[[Entry], Situation]] = {
    "accumulation": lambda _: (make_classifier(), {"accumulate_grad_batches": 3}),
    "bf16": lambda _: (make_classifier(), {"precision": "bf16-mixed"}),
    "fp16": lambda _: (make_classifier(), _scaled()),
    "fused_fp16": _fused,
    "ddp": lambda _: _stand_in("DDPStrategy"),
    "fsdp2": lambda _: _stand_in("ModelParallelStrategy"),
    "fsdp1": lambda _: _stand_in("FSDPStrategy"),
    "deepspeed": lambda _: _stand_in("DeepSpeedStrategy"),
    "compiled": _compiled,
    "several_optimizers": lambda _: (make_classifier(manual=True), {}),
    "manual_optimization": lambda _: (make_classifier(manual=True), {}),
    "weight_averaging": lambda _: (make_classifier(), {"callbacks": [EMAWeightAveraging()]}),
    "gradient_clip_val": lambda _: (make_classifier(), {"gradient_clip_val": 0.5}),
    "late_gradients": lambda _: _stand_in("Compressing", gradient_is_compressed=True),
    "local_steps": lambda _: _stand_in("LocalSteps", has_local_steps=True),
    "no_second_moment": lambda _: (make_classifier(optimizer="sgd"), {}),
    "sparse_gradients": _sparse,
    "complex_parameters": _complex,
}


# Every "no" raises.


class _NoBatch(pl.Callback):
    def on_train_batch_start(self, *_: Any) -> None:
        raise AssertionError("a batch was trained before the refusal")


def said_by(answer: Answer) -> str:
    """Return a pattern of the error that a refusal must raise."""
    blank = re.compile(r"\\\{(?:value)?\\\}")
    return blank.sub(".+", re.escape(f"{answer.note}. {answer.way_out}."))


def refusals(entries: list[Any], first: list[Any]) -> list[Any]:
    """Return each field that an entry refuses; of a variant those that the first entry of its class does not."""
    refused = {str(entry): {f for f, answer in entry.works_with.answers.items() if answer.is_no} for entry in entries}
    known = {entry.name: refused[str(entry)] for entry in first}
    return [
        pytest.param(entry, field, id=f"{entry}-{field}")
        for entry in entries
        for field in sorted(refused[str(entry)] - (set() if entry in first else known[entry.name]))
    ]


@pytest.mark.parametrize(("technique", "field"), refusals(settings.TECHNIQUES, settings.CANONICAL))
def test_what_a_callback_does_not_work_with_is_refused(technique, field):
    module, arguments = SITUATIONS[field](technique)
    beside = arguments.pop("callbacks", [])
    with pytest.raises(ValueError, match=rf"^{technique.name} {said_by(technique.works_with.answers[field])}$"):
        fit([_NoBatch(), *beside, technique.build()], module, **arguments)


def _refused(scheme: Scheme, field: str) -> str:
    module, arguments = SITUATIONS[field](scheme)
    beside = arguments.pop("callbacks", [])
    with pytest.raises(ValueError, match=scheme.name) as error:
        train_on_ranks(scheme.build(), [_NoBatch(), *beside], module, **arguments)
    return str(error.value)


@pytest.mark.parametrize(
    ("scheme", "field"),
    [
        case
        for case in refusals(strategy_settings.SCHEMES, strategy_settings.CANONICAL)
        if case.values[1] != "pytorch_lightning"
    ],
)
def test_what_a_strategy_does_not_work_with_is_refused(scheme, field):
    (message,) = on_ranks(1, _refused, scheme, field)
    assert re.fullmatch(rf"{scheme.name} {said_by(scheme.works_with.answers[field])}", message), message


@pytest.mark.parametrize("scheme", strategy_settings.CANONICAL, ids=str)
def test_the_trainer_of_the_other_namespace_takes_no_strategy_of_this_one(scheme):
    assert scheme.works_with.pytorch_lightning.is_no
    with pytest.raises(ValueError, match="invalid strategy name"):
        make_trainer(pytorch_lightning.Trainer, strategy=scheme.build())


# Every "yes", and every "stand-in", is run.


def works(field: str, entries: list[Any]) -> list[Any]:
    return [entry for entry in entries if not entry.works_with.answers[field].is_no]


def _train(technique: Technique, field: str) -> None:
    module, arguments = SITUATIONS[field](technique)
    start = start_of(module)
    fit([technique.build()], module, max_epochs=2, **arguments)
    for name, value in module.state_dict().items():
        assert value.isfinite().all(), name
    assert any(not torch.equal(value, start[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("technique", works("fused_fp16", settings.CANONICAL), ids=str)
def test_fused_optimizer_with_a_grad_scaler(technique):
    _train(technique, "fused_fp16")


@pytest.mark.parametrize("technique", works("sparse_gradients", settings.CANONICAL), ids=str)
def test_sparse_gradients(technique):
    _train(technique, "sparse_gradients")


@pytest.mark.parametrize("technique", works("complex_parameters", settings.CANONICAL), ids=str)
def test_complex_parameters(technique):
    _train(technique, "complex_parameters")


@pytest.mark.parametrize("technique", [t for t in settings.CANONICAL if not t.compile], ids=str)
def test_a_compiled_submodule(technique):
    """Of what gives a compiler nothing else to trace; the others are compared with uncompiled runs elsewhere."""
    _train(technique, "compiled")


def _beside_late_gradients(family: list[Technique]) -> None:
    for technique in family:
        strategy = DGCStrategy(ratio=0.05, warmup=None, min_numel=8)
        trainer, _ = train_on_ranks(strategy, [technique.build()], make_classifier(), max_epochs=2)
        assert strategy.gradient_is_compressed, technique
        assert strategy.ledger.steps == trainer.global_step > 6, technique


_LATE = works("late_gradients", settings.CANONICAL)


@pytest.mark.parametrize("family", sorted({technique.family for technique in _LATE}))
def test_gradients_that_come_late(family):
    on_ranks(1, _beside_late_gradients, [technique for technique in _LATE if technique.family == family])


def _beside_local_steps() -> list[Tensor]:
    ended = []
    for technique in _LOCAL:
        strategy = DiLoCoStrategy(sync_every_n_steps=2)
        trainer, module = train_on_ranks(strategy, [technique.build()], make_classifier(), max_epochs=2)
        assert 1 < strategy.ledger.steps < trainer.global_step, technique
        ended.append(torch.cat([parameter.detach().view(-1) for parameter in module.parameters()]))
    return ended


_LOCAL = works("local_steps", settings.CANONICAL)


def test_ranks_that_train_apart():
    for technique, first, second in zip(_LOCAL, *on_ranks(2, _beside_local_steps), strict=True):
        assert torch.equal(first, second), technique
        assert first.isfinite().all(), technique


_SHARDED = composition.test_sharded_strategies_work_or_are_refused_before_the_first_batch
_OF_CALLBACKS: Mapping[str, tuple[Callable[..., None], ...]] = {
    "fused_fp16": (test_fused_optimizer_with_a_grad_scaler,),
    "fsdp2": (fully_sharded.test_callbacks_train_a_sharded_module_as_ddp_trains_it,),
    "fsdp1": (_SHARDED,),
    "deepspeed": (_SHARDED,),
    "compiled": (test_a_compiled_submodule,),
    "late_gradients": (test_gradients_that_come_late,),
    "local_steps": (test_ranks_that_train_apart,),
    "no_second_moment": (test_sparse_gradients,),
    "sparse_gradients": (test_sparse_gradients,),
    "complex_parameters": (test_complex_parameters,),
}
_OF_CHECKS = {"several_optimizers": "manual_optimization"}  # Lightning allows them only there


def _fit_sparse(scheme: Scheme, folder: Path) -> dict[str, Tensor]:
    module, arguments = _sparse(scheme)
    train_on_ranks(scheme.build(), (), module, max_epochs=2, **arguments)
    return dict(module.state_dict())


SPARSE = [(scheme,) for scheme in strategy_settings.CANONICAL if not scheme.works_with.sparse_gradients.is_no]


@pytest.mark.parametrize("case", SPARSE)
def test_a_strategy_trains_an_embedding_with_sparse_gradients(case, together):
    (first, second), _ = together(_fit_sparse, SPARSE, case)
    assert torch.equal(first["norm.1.table.weight"], second["norm.1.table.weight"])
    assert not torch.equal(first["norm.1.table.weight"], _sparse(case[0])[0].norm[1].table.weight)


_ALL_IN_ONE = {
    test_gradients_that_come_late: _LATE,
    test_ranks_that_train_apart: _LOCAL,
    fully_sharded.test_callbacks_train_a_sharded_module_as_ddp_trains_it: fully_sharded.FULLY_SHARDED,
}
_BESIDE = strategies_composition.test_beside_callbacks
_OF_STRATEGIES: Mapping[str, tuple[Callable[..., None], ...]] = {
    "accumulation": (strategies_composition.test_trainer_options,),
    "bf16": (strategies_composition.test_trainer_options,),
    "compiled": (strategies_composition.test_compiled_submodules_give_the_same_weights,),
    "weight_averaging": (_BESIDE,),
    "gradient_clip_val": (strategies_composition.test_clipping_of_the_trainer_sees_the_mean_gradient,),
    "no_second_moment": (_BESIDE,),  # with SGD
    "sparse_gradients": (test_a_strategy_trains_an_embedding_with_sparse_gradients,),
}


def entries_checked(field: str) -> list[Entry]:
    """Return the entries that a check of the public tool runs over."""
    checks = {check.name for check in CHECKS.values() if check.feature == _OF_CHECKS.get(field, field)}
    on_ranks = BROAD if guarantees.ON_SHARED_RANKS in checks else []
    return [*(technique for technique, check in guarantees.HELD_TO if check.name in checks), *on_ranks]


def entries_of(test: Any) -> list[Entry]:
    """Return the entries that a contract test runs over."""
    if test in _ALL_IN_ONE:
        return list(_ALL_IN_ONE[test])
    given = [mark.args[1] for mark in test.pytestmark if mark.name == "parametrize"]
    rows = [row if isinstance(row, tuple) else (row,) for values in given for row in values]
    return [value for row in rows for value in row if isinstance(value, Entry)]


@pytest.mark.parametrize("entry", [*settings.CANONICAL, *strategy_settings.CANONICAL], ids=str)
def test_what_is_declared_to_work_is_run_by_a_test(entry):
    tests = _OF_STRATEGIES if isinstance(entry, Scheme) else _OF_CALLBACKS
    for field, answer in entry.kind.compatibility.answers.items():
        if answer.works in ("yes", "stand-in"):
            run = [other for test in tests.get(field, ()) for other in entries_of(test)]
            run += [] if isinstance(entry, Scheme) else entries_checked(field)
            names = (
                {entry.name} if getattr(entry, "broad", True) else {scheme.name for scheme in strategy_settings.BROAD}
            )
            works = [not other.works_with.answers[field].is_no for other in run if other.name in names]
            assert any(works), f"no test runs {entry} with {field}"


@pytest.mark.parametrize("field", ["fsdp1", "deepspeed"])
def test_what_ran_under_stand_ins_only_says_so(field):
    """None of these tests has a real sharding strategy, which a CPU refuses."""
    kinds = [entry.kind for entry in (*settings.CANONICAL, *strategy_settings.CANONICAL)]
    assert "yes" not in {kind.compatibility.answers[field].works for kind in kinds}
