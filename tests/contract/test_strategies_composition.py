"""G6 of strategies: they compose with what Lightning and the callbacks here offer."""

import functools
import itertools
import re
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch.utils.data import DataLoader, TensorDataset

from lightning_grad import callbacks
from lightning_grad.testing import BATCH, assert_identical, loaders, make_classifier, make_data, make_trainer, on_ranks
from tests.contract.strategy_settings import BROAD, CANONICAL, SCHEMES, Scheme
from tests.strategies.fits import finish, outcome, train_on_ranks

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


EACH = [(scheme,) for scheme in BROAD]


def _without(message: str) -> Any:
    """Return a decorator for a fit that expects a warning; the ranks of a group are forked under one test's filters."""

    def decorate(work: Any) -> Any:
        @functools.wraps(work)
        def run(*case: Any) -> Any:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message)
                return work(*case)

        return run

    return decorate


def _fit_with(scheme: Scheme, arguments: dict[str, Any], make_callbacks: Any = list) -> dict[str, Any]:
    module = scheme.module()
    start = {name: value.clone() for name, value in module.state_dict().items()}
    trainer, _ = train_on_ranks(scheme.build(), make_callbacks(), module, **{"max_epochs": 2, **arguments})
    for name, value in module.state_dict().items():
        assert torch.isfinite(value).all(), name
    assert any(not torch.equal(value, start[name]) for name, value in module.state_dict().items())
    assert trainer.strategy.memory
    return outcome(trainer, module)


def assert_ranks_agree(results: list[dict[str, Any]], scheme: Scheme) -> None:
    for name, _ in scheme.module().named_parameters():
        for other in results[1:]:
            assert torch.equal(results[0]["module"][name], other["module"][name]), name


_OPTIONS: dict[str, dict[str, Any]] = {
    "accumulate_grad_batches": {"accumulate_grad_batches": 3},
    "precision": {"precision": "bf16-mixed"},
    "max_steps": {"max_steps": 7, "max_epochs": -1},
    "val_check_interval": {"val_check_interval": 2},
    "fast_dev_run": {"fast_dev_run": 5},
    "detect_anomaly": {"sync_batchnorm": False, "detect_anomaly": True},
}
OPTIONS = list(itertools.product(BROAD, _OPTIONS))


def _fit_with_options(scheme: Scheme, name: str, folder: Path) -> dict[str, Any]:
    return _fit_with(scheme, _OPTIONS[name])


@pytest.mark.parametrize("case", OPTIONS)
def test_trainer_options(case, together):
    assert_ranks_agree(together(_fit_with_options, OPTIONS, case)[0], case[0])


def _bf16_true(scheme: Scheme, folder: Path) -> dict[str, Any]:
    module = scheme.module()
    inputs, targets = make_data().tensors
    half = DataLoader(TensorDataset(inputs.bfloat16(), targets), BATCH)
    strategy = scheme.build()
    trainer = make_trainer(strategy=strategy, devices=2, precision="bf16-true", max_epochs=2)
    trainer.fit(module, half, half)
    kept = [strategy.memory[name] for name, _ in module.named_parameters() if name in strategy.memory]
    assert kept
    assert all(value.dtype == torch.float32 for one in kept for value in one.values())
    return outcome(trainer, module)


@pytest.mark.parametrize("case", EACH)
def test_half_precision_keeps_what_is_unsent_in_float32(case, together):
    results, _ = together(_bf16_true, EACH, case)
    assert_ranks_agree(results, case[0])
    assert all(value.isfinite().all() for value in results[0]["module"].values())


def _micro_batches(scheme: Scheme, folder: Path) -> None:
    """Three micro-batches that are the same are one batch: accumulation exchanges once a step."""
    strategy = scheme.build()
    trainer, _ = train_on_ranks(strategy, (), scheme.module(), accumulate_grad_batches=3)
    assert trainer.global_step == 3
    assert strategy.ledger.steps == (1 if scheme.is_local else 3)


@pytest.mark.parametrize("case", EACH)
def test_accumulation_exchanges_once_a_step(case, together):
    together(_micro_batches, EACH, case)


@functools.cache  # on a rank, for the cases that it runs
def _bare(scheme: Scheme) -> dict[str, Any]:
    return finish(scheme.build(), module=scheme.module(), max_epochs=2)


@_without("The .grad attribute of a Tensor that is not a leaf")
def _compiled(scheme: Scheme, how: str, folder: Path) -> None:
    expected = _bare(scheme)
    module = scheme.module()
    torch._dynamo.reset()
    if how == "module.compile()":
        module.hidden.compile(backend="eager")
        module.encoder.compile(backend="eager")
    else:
        module.hidden = torch.compile(module.hidden, backend="eager")
    strategy = scheme.build()
    train_on_ranks(strategy, (), module, max_epochs=2)
    for name, value in module.state_dict().items():
        assert torch.allclose(value, expected["module"][name.replace("_orig_mod.", "")], atol=1e-5), name
    assert strategy.memory.keys() == expected["memory"].keys()


COMPILED = list(itertools.product(BROAD, ["module.compile()", "torch.compile(module)"]))


@pytest.mark.parametrize("case", COMPILED)
def test_compiled_submodules_give_the_same_weights(case, together):
    together(_compiled, COMPILED, case)


_SPARSE = {"pattern": "1:4", "include": ["encoder.*", "hidden", "mix.w"], "recipe": "sr-ste"}
_BESIDE: dict[str, Any] = {
    "NMSparsity": lambda: callbacks.NMSparsity(**_SPARSE),
    "SkipNonFinite": callbacks.SkipNonFinite,
    "GradientMonitor": callbacks.GradientMonitor,
    "InfoBatch": lambda: callbacks.InfoBatch(prune=0.5),
    "AccuracyGradientLR": lambda: callbacks.AccuracyGradientLR(window=1, cooldown=1, threshold=10.0, factor=0.5),
    "AdversarialTraining": lambda: callbacks.AdversarialTraining(epsilon=0.1),
    "GradientNoise": lambda: callbacks.GradientNoise(eta=0.01),
    "EMAWeightAveraging": lambda: EMAWeightAveraging(decay=0.8),
}


_NO_MOMENTUM = "the term gets no momentum and is weaker by a factor of 1 / .1 - momentum."


_SEVERAL = (
    "NMSparsity",
    "SkipNonFinite",
    "GradientNoise",
    "GradientMonitor",
    "AdversarialTraining",
    "AccuracyGradientLR",
)
COMPANY = [
    (scheme, names)
    for scheme, names in itertools.product(BROAD, [*((name,) for name in _BESIDE), _SEVERAL])
    if names != ("EMAWeightAveraging",) or not scheme.works_with.weight_averaging.is_no
]


def _fit_beside(scheme: Scheme, names: tuple[str, ...], folder: Path) -> dict[str, Any]:
    return _fit_with(scheme, {}, lambda: [_BESIDE[name]() for name in names])


@pytest.mark.filterwarnings(f"ignore:.*{_NO_MOMENTUM}")
@pytest.mark.parametrize("case", COMPANY)
def test_beside_callbacks(case, together):
    assert_ranks_agree(together(_fit_beside, COMPANY, case)[0], case[0])


def _warned(name: str, **changes: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_on_ranks(CANONICAL[0].build(**changes), [_BESIDE[name]()], make_classifier(optimizer="sgd"), max_epochs=1)
    return [str(warning.message) for warning in caught if re.search(_NO_MOMENTUM, str(warning.message))]


def test_what_is_added_behind_the_momentum_is_said():
    names = ("NMSparsity", "GradientNoise")

    def work() -> list[list[str]]:
        silent = [_warned("GradientMonitor"), *(_warned(name, correction="error_feedback") for name in names)]
        return [*map(_warned, names), *silent]

    (((sparse,), (noisy,), *silent),) = on_ranks(1, work)
    assert sparse.startswith("NMSparsity adds ")
    assert noisy.startswith("GradientNoise adds ")
    assert silent == [[]] * 3


class _BreakOneRank(pl.Callback):
    """Makes the loss of one rank NaN, once."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        step = pl_module.training_step

        def breaking(batch: Any, batch_idx: int) -> Any:
            loss = step(batch, batch_idx)
            broken = trainer.global_step == 4 and trainer.is_global_zero
            return loss * float("nan") if broken else loss

        pl_module.training_step = breaking


@_without(".*SkipNonFinite")
def _break_and_skip(scheme: Scheme, folder: Path) -> dict[str, Any]:
    return _fit_with(scheme, {}, lambda: [_BreakOneRank(), callbacks.SkipNonFinite()])


@pytest.mark.parametrize("case", EACH)
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(case, together):
    both, _ = together(_break_and_skip, EACH, case)
    assert_ranks_agree(both, case[0])
    for left in both:
        assert all(value.isfinite().all() for kept in left["memory"].values() for value in kept.values())


def _clipped_by_the_trainer(scheme: Scheme, folder: Path) -> None:
    seen: list[float] = []

    class Norm(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            seen.append(float(torch.nn.utils.get_total_norm(gradients)))

    train_on_ranks(scheme.build(), [Norm()], scheme.module(), gradient_clip_val=0.01, max_epochs=2)
    assert seen
    assert max(seen) <= 0.01 * (1 + 1e-4)


CLIPPED = [(scheme,) for scheme in SCHEMES if not scheme.works_with.gradient_clip_val.is_no]


@pytest.mark.parametrize("case", CLIPPED)
def test_clipping_of_the_trainer_sees_the_mean_gradient(case, together):
    together(_clipped_by_the_trainer, CLIPPED, case)


def _frozen(scheme: Scheme, folder: Path) -> None:
    module = scheme.module()
    module.encoder.requires_grad_(False)
    start = {name: value.clone() for name, value in module.encoder.state_dict().items()}
    strategy = scheme.build(**{"exclude": None} if "exclude" in scheme.build().settings else {})
    train_on_ranks(strategy, (), module, max_epochs=2)
    assert_identical(start, dict(module.encoder.state_dict()))
    assert not any(name.startswith("encoder") for name in strategy.memory)


@pytest.mark.parametrize("case", EACH)
def test_frozen_parameters_stay_what_they_are(case, together):
    together(_frozen, EACH, case)


def _ddp_options(scheme: Scheme, folder: Path) -> None:
    expected = _bare(scheme)
    for arguments in ({"static_graph": True}, {"gradient_as_bucket_view": True}):
        found = finish(scheme.build(**arguments), module=scheme.module(), max_epochs=2)
        assert_identical(expected, found, str(arguments))


@pytest.mark.parametrize("case", EACH)
def test_options_of_ddp_change_nothing(case, together):
    together(_ddp_options, EACH, case)


def _without_broadcast(scheme: Scheme) -> tuple[dict[str, Any], dict[str, Any]]:
    ours, plain = (
        finish(strategy, module=scheme.module(), max_epochs=1)["module"]
        for strategy in (scheme.build(broadcast_buffers=False), pl.strategies.DDPStrategy(broadcast_buffers=False))
    )
    return ours, plain


@pytest.mark.filterwarnings(
    "ignore:`broadcast_buffers` is deprecated:FutureWarning"
)  # by torch 2.13, of DDP itself too
def test_buffers_stay_apart_where_that_is_asked_for():
    first, second = on_ranks(2, _without_broadcast, CANONICAL[0])
    for ours, theirs in zip(first, second, strict=True):
        assert not torch.equal(ours["norm.running_mean"], theirs["norm.running_mean"])


@_without("Using `DistributedSampler` with the dataloaders")
def _validate_after_a_fit(scheme: Scheme, folder: Path) -> None:
    trainer, module = train_on_ranks(scheme.build(), (), scheme.module(), max_epochs=2)
    before = outcome(trainer, module)
    (metrics,) = trainer.validate(module, loaders()[1], verbose=False)
    assert metrics["val_loss"] > 0
    assert_identical(before["memory"], trainer.strategy.memory)
    assert trainer.strategy.ledger.steps == before["sent"][0]


@pytest.mark.parametrize("case", EACH)
def test_validation_after_a_fit_leaves_the_memory_alone(case, together):
    together(_validate_after_a_fit, EACH, case)


TOGETHER = (
    {_compiled: COMPILED, _ddp_options: EACH},
    {
        _bf16_true: EACH,
        _micro_batches: EACH,
        _break_and_skip: EACH,
        _clipped_by_the_trainer: CLIPPED,
        _frozen: EACH,
        _validate_after_a_fit: EACH,
    },
)
