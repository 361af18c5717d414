"""What cannot be compressed is refused before the first batch, in words that say what to do."""

import re
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from lightning_grad.testing import assert_identical, make_classifier, on_ranks
from tests.contract import settings
from tests.contract.strategy_settings import CANONICAL, SCHEMES, Scheme
from tests.strategies.fits import outcome, train_on_ranks
from tests.strategies.ranks import said

DGC, POWER = CANONICAL


@pytest.mark.parametrize(
    ("scheme", "arguments", "words"),
    [(scheme, arguments, words) for scheme in SCHEMES for arguments, words in scheme.wrong],
    ids=str,
)
def test_wrong_arguments_raise_in_the_constructor(scheme, arguments, words):
    with pytest.raises(ValueError, match=words):
        type(scheme.build())(**arguments)


@pytest.mark.parametrize("scheme", CANONICAL, ids=str)
def test_unknown_arguments_are_not_swallowed(scheme):
    with pytest.raises(TypeError):
        scheme.build(no_such_argument=1)


@pytest.mark.parametrize("scheme", CANONICAL, ids=str)
def test_one_name_is_no_list_of_names(scheme):
    with pytest.raises(TypeError, match=re.escape("Write ['head']")):
        scheme.build(exclude="head")


class _NoBatch(pl.Callback):
    def on_train_batch_start(self, *_: Any) -> None:
        raise AssertionError("a batch was trained before the refusal")


def _refused(build: Any, module: Any, arguments: dict[str, Any], kind: type[Exception]) -> str:
    extra = arguments.pop("extra", [])
    with pytest.raises(kind) as error:
        train_on_ranks(build(), [_NoBatch(), *extra], module(), **arguments)
    return str(error.value)


def refusal(build: Any, module: Any, kind: type[Exception] = ValueError, **arguments: Any) -> str:
    """Return the words with which a fit is refused, on one rank."""
    (message,) = on_ranks(1, _refused, build, module, arguments, kind)
    return message


def sgd() -> Any:
    return make_classifier(optimizer="sgd")


def with_optimizer(make: Any) -> Any:
    """Return a builder of the module with other optimizers."""

    def build() -> Any:
        module = sgd()
        module.configure_optimizers = lambda: make(list(module.parameters()))
        return module

    return build


@pytest.mark.parametrize("value", [0.5, 2])
def test_clipping_of_the_trainer_under_dgc(value):
    message = refusal(DGC.build, sgd, gradient_clip_val=value)
    assert f"Trainer(gradient_clip_val={value})" in message
    assert f"gradient_clip_val=None and DGCStrategy(local_clip={value})" in message


def test_clipping_by_value_of_the_trainer_under_dgc():
    message = refusal(DGC.build, sgd, gradient_clip_val=0.5, gradient_clip_algorithm="value")
    assert "gradient_clip_val=0.5" in message
    assert "local_clip clips by norm" in message


_CLIPPERS = pytest.mark.parametrize(
    "clipper", [t for t in settings.CANONICAL if t.works_with.late_gradients.is_no], ids=str
)


@_CLIPPERS
def test_clipping_callbacks_under_dgc(clipper):
    message = refusal(DGC.build, sgd, extra=[clipper.build()])
    assert clipper.name in message
    assert "local_clip" in message


@_CLIPPERS
def test_clipping_callbacks_under_powersgd_and_neutral_dgc_work(clipper):
    on_ranks(1, _fit_both, clipper)


def _fit_both(clipper: settings.Technique) -> None:
    for build in (POWER.build, DGC.build_neutral):
        trainer, _ = train_on_ranks(build(), [clipper.build()], make_classifier(), max_epochs=1)
        assert trainer.global_step == 6


@pytest.mark.parametrize("scheme", CANONICAL, ids=str)
def test_several_optimizers(scheme):
    def two(parameters: list[Any]) -> list[Any]:
        return [torch.optim.SGD(parameters[:3], 0.1), torch.optim.SGD(parameters[3:], 0.1)]

    # Lightning itself refuses several optimizers unless they are stepped by hand.
    message = refusal(scheme.build, with_optimizer(two), RuntimeError)
    assert "multiple optimizers" in message


@pytest.mark.parametrize("scheme", CANONICAL, ids=str)
def test_manual_optimization(scheme):
    message = refusal(scheme.build, lambda: make_classifier(optimizer="sgd", manual=True))
    assert f"{scheme.name} does not work with manual optimization" in message
    assert "strategy='ddp'" in message


@pytest.mark.parametrize("scheme", CANONICAL, ids=str)
def test_fp16_with_a_grad_scaler(scheme):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    message = refusal(scheme.build, sgd, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert f"{scheme.name} adds up gradients over steps" in message
    assert "bf16-mixed" in message


def _with_embedding(**arguments: Any) -> Any:
    module = sgd()
    module.table = nn.Embedding(100, 16, **arguments)
    return module


@pytest.mark.parametrize("scheme", CANONICAL, ids=str)
def test_sparse_gradients(scheme):
    message = refusal(scheme.build, lambda: _with_embedding(sparse=True))
    assert f"{scheme.name} needs dense gradients, and Embedding 'table'" in message
    assert "sparse=False" in message


@pytest.mark.parametrize("scheme", CANONICAL, ids=str)
def test_complex_parameters(scheme):
    def build() -> Any:
        module = sgd()
        module.waves = nn.Parameter(torch.zeros(8, 8, dtype=torch.complex64))
        return module

    message = refusal(scheme.build, build)
    assert f"{scheme.name} compresses real gradients, and 'waves' is complex" in message


class _OwnSGD(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


_NOT_MOVED = {
    "AdamW": (torch.optim.AdamW, {}, "AdamW is not torch.optim.SGD"),
    "own step": (_OwnSGD, {"momentum": 0.9}, "_OwnSGD is not torch.optim.SGD"),
    "dampening": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5}, "this SGD has dampening=0.5"),
}


def _optimizer(name: str) -> Any:
    kind, options, _ = _NOT_MOVED[name]
    return with_optimizer(lambda parameters: kind(parameters, lr=0.1, **options))


@pytest.mark.parametrize("name", _NOT_MOVED)
def test_momentum_correction_of_an_optimizer_whose_momentum_cannot_be_moved(name):
    message = refusal(lambda: DGC.build(correction="momentum"), _optimizer(name))
    assert _NOT_MOVED[name][2] in message
    assert "correction='error_feedback'" in message


def _fits(name: str) -> list[Any]:
    """Fit with each correction that goes with the optimizer, and return what each left behind and said."""
    found = []
    for correction in ("auto", "error_feedback"):
        with said() as lines:
            left = outcome(*train_on_ranks(DGC.build(correction=correction), module=_optimizer(name)(), max_epochs=1))
        found.append((left, lines))
    return found


@pytest.mark.parametrize("name", _NOT_MOVED)
def test_auto_chooses_error_feedback_for_it_and_says_so(name):
    ((auto, lines), (feedback, others)) = on_ranks(1, _fits, name)[0]
    (line,) = (line for line in lines if "correction='auto'" in line)
    assert line.startswith("DGCStrategy compresses ")
    assert f"correction='auto' chose error feedback, because {_NOT_MOVED[name][2]}" in line
    assert line.endswith(".")
    assert not any("correction=" in line for line in others)
    assert_identical(auto, feedback)


def _fits_with_sgd() -> list[str]:
    with said() as lines:
        train_on_ranks(DGC.build(), module=sgd(), max_epochs=1)
    return [line for line in lines if "DGCStrategy" in line]


def test_auto_moves_the_momentum_of_sgd_and_needs_no_remark():
    (lines,) = on_ranks(1, _fits_with_sgd)
    (line,) = lines
    assert line.endswith("the others go dense.")


@pytest.mark.parametrize(
    "build",
    [lambda: DGC.build(correction="error_feedback"), DGC.build, POWER.build],
    ids=["error", "momentum", "power"],
)
def test_lbfgs(build):
    message = refusal(build, with_optimizer(torch.optim.LBFGS))
    assert "LBFGS" in message


@pytest.mark.parametrize("scheme", CANONICAL, ids=str)
def test_names_that_match_nothing(scheme):
    message = refusal(lambda: scheme.build(exclude=["encodr.*"]), sgd)
    assert "(exclude=...): no parameter is named 'encodr.*'" in message
    assert "encoder" in message


def test_layer_ratios_that_match_nothing():
    message = refusal(lambda: DGC.build(layer_ratios={"haed": 0.5}), sgd)
    assert "(layer_ratios=...): no parameter is named 'haed'" in message
    assert "head" in message


def _warned(scheme: Scheme) -> None:
    with pytest.warns(UserWarning, match="has nothing to compress, and is DDP.*min_numel=1000000"):
        trainer, _ = train_on_ranks(scheme.build(min_numel=1_000_000), module=scheme.module(), max_epochs=1)
    assert trainer.global_step == 6


@pytest.mark.parametrize("scheme", CANONICAL, ids=str)
def test_nothing_to_compress_is_said(scheme):
    on_ranks(1, _warned, scheme)


def _own_clipping() -> None:
    module = sgd()

    class Clips(type(module)):
        def configure_gradient_clipping(self, optimizer: Any, *arguments: Any, **more: Any) -> None:
            super().configure_gradient_clipping(optimizer, *arguments, **more)

    module.__class__ = Clips
    with pytest.warns(UserWarning, match="use local_clip instead"):
        train_on_ranks(DGC.build(), module=module, max_epochs=1)


def test_the_modules_own_clipping_is_warned_about_under_dgc():
    on_ranks(1, _own_clipping)


def _validate_only(scheme: Scheme) -> None:
    """What only fitting could not do is no reason to refuse anything else."""
    from lightning_grad.testing import loaders, make_trainer

    trainer = make_trainer(strategy=scheme.build(), gradient_clip_val=1.0)
    (metrics,) = trainer.validate(make_classifier(manual=True), loaders()[1], verbose=False)
    assert metrics["val_loss"] > 0


@pytest.mark.parametrize("scheme", CANONICAL, ids=str)
def test_validation_refuses_nothing(scheme):
    on_ranks(1, _validate_only, scheme)


def _tied_choice(scheme: Scheme, name: str) -> set[str]:
    module = sgd()
    module.twin = nn.Linear(module.hidden.in_features, module.hidden.out_features)
    module.twin.weight = module.hidden.weight
    module.twin.bias.requires_grad_(False)  # DDP wants every parameter that trains to be used
    strategy = scheme.build(exclude=[name])
    with pytest.raises(AssertionError, match="a batch was trained"):  # all is chosen by then
        train_on_ranks(strategy, [_NoBatch()], module, max_epochs=1)
    return set(strategy._chosen)


@pytest.mark.parametrize("scheme", CANONICAL, ids=str)
def test_a_tied_weight_is_left_out_by_each_of_its_names(scheme):
    (first,), (second,) = (on_ranks(1, _tied_choice, scheme, name) for name in ("hidden", "twin"))
    assert first == second
    assert "hidden.weight" not in first
    assert first
