"""What cannot be compressed is refused before the first batch, in words that say what to do."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from lightning_grad.testing import assert_identical, make_classifier, on_ranks
from tests.contract import settings
from tests.contract.strategy_settings import CANONICAL, COMPRESSING, SCHEMES, Scheme
from tests.strategies.fits import outcome, train_on_ranks
from tests.strategies.ranks import said

DGC, _, POWER = COMPRESSING


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


@pytest.mark.parametrize("scheme", COMPRESSING, ids=str)
def test_one_name_is_no_list_of_names(scheme):
    with pytest.raises(TypeError, match=re.escape("Write ['head']")):
        scheme.build(exclude="head")


class _NoBatch(pl.Callback):
    def on_train_batch_start(self, *_: Any) -> None:
        raise AssertionError("a batch was trained before the refusal")


@dataclass(frozen=True)
class Refusal:
    """A fit that is refused before its first batch, on one rank.

    Args:
        words: What the error says.
        build: Makes the strategy.
        module: Makes the module.
        arguments: Of the Trainer.
        callbacks: Makes callbacks.
        kind: Of the error.
    """

    words: tuple[str, ...]
    build: Any
    module: Any = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    callbacks: Any = list
    kind: type[Exception] = ValueError

    def provoke(self) -> str:
        """Return what the error says."""
        with pytest.raises(self.kind) as error:
            train_on_ranks(self.build(), [_NoBatch(), *self.callbacks()], (self.module or sgd)(), **self.arguments)
        return str(error.value)


def sgd() -> Any:
    return make_classifier(optimizer="sgd")


def with_optimizer(make: Any) -> Any:
    """Return a builder of the module with other optimizers."""

    def build() -> Any:
        module = sgd()
        module.configure_optimizers = lambda: make(list(module.parameters()))
        return module

    return build


_CLIPPERS = [
    t for t in settings.CANONICAL if t.works_with.late_gradients.is_no and getattr(t.kind, "role", "") == "clip"
]
CLIPPERS = [(clipper,) for clipper in _CLIPPERS]


@pytest.mark.parametrize("case", CLIPPERS)
def test_clipping_callbacks_under_powersgd_and_neutral_dgc_work(case, together):
    together(_fit_both, CLIPPERS, case, 1)


def _fit_both(clipper: settings.Technique, folder: Path) -> None:
    for build in (POWER.build, DGC.build_neutral):
        trainer, _ = train_on_ranks(build(), [clipper.build()], make_classifier(), max_epochs=1)
        assert trainer.global_step == 6


def _with_embedding(**arguments: Any) -> Any:
    module = sgd()
    module.table = nn.Embedding(100, 16, **arguments)
    return module


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


def _two_optimizers(parameters: list[Any]) -> list[Any]:
    return [torch.optim.SGD(parameters[:3], 0.1), torch.optim.SGD(parameters[3:], 0.1)]


def _with_waves() -> Any:
    module = sgd()
    module.waves = nn.Parameter(torch.zeros(8, 8, dtype=torch.complex64))
    return module


def _refusals_of_each(scheme: Scheme) -> dict[str, Refusal]:
    name, build = scheme.name, scheme.build
    scaled = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    return {
        # Lightning itself refuses several optimizers unless they are stepped by hand.
        "several optimizers": Refusal(
            ("multiple optimizers",), build, with_optimizer(_two_optimizers), kind=RuntimeError
        ),
        "manual optimization": Refusal(
            (f"{name} does not work with manual optimization", "strategy='ddp'"),
            build,
            lambda: make_classifier(optimizer="sgd", manual=True),
        ),
        "a GradScaler": Refusal(
            (f"{name} adds up gradients over steps", "bf16-mixed"), build, arguments={"plugins": [scaled]}
        ),
        "sparse gradients": Refusal(
            (f"{name} needs dense gradients, and Embedding 'table'", "sparse=False"),
            build,
            lambda: _with_embedding(sparse=True),
        ),
        "complex parameters": Refusal(
            (f"{name} compresses only real gradients, and 'waves' has complex ones",), build, _with_waves
        ),
        "LBFGS": Refusal(("LBFGS",), build, with_optimizer(torch.optim.LBFGS)),
        "names that match nothing": Refusal(
            ("(exclude=...): no parameter or module is named 'encodr.*'", "encoder"),
            lambda: build(exclude=["encodr.*"]),
        ),
    }


def _clipped_by_the_trainer(value: float) -> Refusal:
    words = (f"Trainer(gradient_clip_val={value})", f"gradient_clip_val=None and DGCStrategy(local_clip={value})")
    return Refusal(words, DGC.build, arguments={"gradient_clip_val": value})


REFUSALS: dict[str, Refusal] = {
    **{f"{scheme}, {name}": of for scheme in COMPRESSING for name, of in _refusals_of_each(scheme).items()},
    **{f"clipping by the Trainer to {value}": _clipped_by_the_trainer(value) for value in (0.5, 2)},
    "clipping by value": Refusal(
        ("gradient_clip_val=0.5", "local_clip clips by norm"),
        DGC.build,
        arguments={"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"},
    ),
    **{
        clipper.name: Refusal(
            (clipper.name, "local_clip"), DGC.build, callbacks=lambda clipper=clipper: [clipper.build()]
        )
        for clipper in _CLIPPERS
    },
    **{
        f"momentum that cannot be moved, {name}": Refusal(
            (_NOT_MOVED[name][2], "correction='error_feedback'"),
            lambda: DGC.build(correction="momentum"),
            _optimizer(name),
        )
        for name in _NOT_MOVED
    },
    "error feedback with LBFGS": Refusal(
        ("LBFGS",), lambda: DGC.build(correction="error_feedback"), with_optimizer(torch.optim.LBFGS)
    ),
    "layer_ratios that match nothing": Refusal(
        ("(layer_ratios=...): no parameter or module is named 'haed'", "head"),
        lambda: DGC.build(layer_ratios={"haed": 0.5}),
    ),
}


@pytest.fixture(scope="module")
def refusals() -> dict[str, str]:
    """Return the words of each refusal, all of the same rank."""
    (messages,) = on_ranks(1, lambda: {name: refusal.provoke() for name, refusal in REFUSALS.items()})
    return messages


@pytest.mark.parametrize("name", REFUSALS)
def test_it_is_refused_before_the_first_batch_in_words_that_say_what_to_do(name, refusals):
    for words in REFUSALS[name].words:
        assert words in refusals[name]


def _fits(name: str, folder: Path) -> list[Any]:
    """Fit with each correction that goes with the optimizer, and return what each left behind and said."""
    found = []
    for correction in ("auto", "error_feedback"):
        with said() as lines:
            left = outcome(*train_on_ranks(DGC.build(correction=correction), module=_optimizer(name)(), max_epochs=1))
        found.append((left, lines))
    return found


NOT_MOVED = [(name,) for name in _NOT_MOVED]


@pytest.mark.parametrize("case", NOT_MOVED)
def test_auto_chooses_error_feedback_for_it_and_says_so(case, together):
    (((auto, lines), (feedback, others)),), _ = together(_fits, NOT_MOVED, case, 1)
    (name,) = case
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


EACH = [(scheme,) for scheme in COMPRESSING]


def _warned(scheme: Scheme, folder: Path) -> None:
    with pytest.warns(UserWarning, match="has nothing to compress and is plain DDP.*min_numel=1000000"):
        trainer, _ = train_on_ranks(scheme.build(min_numel=1_000_000), module=scheme.module(), max_epochs=1)
    assert trainer.global_step == 6


@pytest.mark.parametrize("case", EACH)
def test_nothing_to_compress_is_said(case, together):
    together(_warned, EACH, case, 1)


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


def _validate_only(scheme: Scheme, folder: Path) -> None:
    """What only fitting could not do is no reason to refuse anything else."""
    from lightning_grad.testing import loaders, make_trainer

    trainer = make_trainer(strategy=scheme.build(), gradient_clip_val=1.0)
    (metrics,) = trainer.validate(make_classifier(manual=True), loaders()[1], verbose=False)
    assert metrics["val_loss"] > 0


@pytest.mark.parametrize("case", EACH)
def test_validation_refuses_nothing(case, together):
    together(_validate_only, EACH, case, 1)


def _tied_choice(scheme: Scheme, name: str) -> set[str]:
    module = scheme.module()
    module.twin = nn.Linear(module.hidden.in_features, module.hidden.out_features)
    module.twin.weight = module.hidden.weight
    module.twin.bias.requires_grad_(False)  # DDP wants every parameter that trains to be used
    strategy = scheme.build(exclude=[name])
    with pytest.raises(AssertionError, match="a batch was trained"):  # all is chosen by then
        train_on_ranks(strategy, [_NoBatch()], module, max_epochs=1)
    return set(strategy._chosen)


def _tied_choices(scheme: Scheme, folder: Path) -> list[set[str]]:
    return [_tied_choice(scheme, name) for name in ("hidden", "twin")]


@pytest.mark.parametrize("case", EACH)
def test_a_tied_weight_is_left_out_by_each_of_its_names(case, together):
    ((first, second),), _ = together(_tied_choices, EACH, case, 1)
    assert first == second
    assert "hidden.weight" not in first
    assert first
