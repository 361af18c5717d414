"""Techniques written from public names keep the guarantees, alone and in a chain, whatever the order of the callbacks."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, OnExceptionCheckpoint
from torch import Tensor, nn

from lightning_grad.callbacks import NMSparsity
from lightning_grad.core import FoundWeight, Stage, ViewedWeight, attach_view, quiet
from lightning_grad.core.views.weight_chain import Chain
from lightning_grad.core.views.weight_view import InPlaceWindow
from lightning_grad.functional import is_nm, nm_mask
from lightning_grad.testing import StopAfter, assert_identical, fit, make_classifier, state_of
from lightning_grad.testing.checks import CHECKS, Check
from lightning_grad.testing.checks.g3_no_trace import assert_nothing_is_left
from lightning_grad.testing.checks.g4_checkpoints import assert_as_validated
from tests.callbacks.sparsity.test_nm_choice import Backwards, InOut
from tests.callbacks.sparsity.test_nm_sparsity import Regression, data, trainer
from tests.contract import test_checkpoints as checkpoints
from tests.contract import test_composition as composition
from tests.contract import test_guarantees as guarantees
from tests.contract import test_resume as resume
from tests.contract.recorded import PLAIN
from tests.contract.settings import Technique
from tests.core import weight_techniques
from tests.core.weight_techniques import NoisyWeight, RoundedWeight, Rounding, WeightNoise

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:`.fit.ckpt_path=None.` was called without a model"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
]

LAYERS = ["encoder.*", "hidden", "mix.w"]
NAMES = [
    "mix.w",
    "encoder.self_attn.in_proj_weight",
    "encoder.self_attn.out_proj.weight",
    "encoder.linear1.weight",
    "encoder.linear2.weight",
    "hidden.weight",
]


@dataclass(frozen=True, eq=False)
class Outside(Technique):
    """A technique that the package does not export."""

    kind: Any = None

    def build(self, **changes: Any) -> Any:
        return self.kind(**{**self.arguments, **changes})

    def build_neutral(self) -> Any:
        return self.kind(**self.neutral)


NOISE = Outside("WeightNoise", arguments={"include": LAYERS}, neutral={"include": LAYERS, "std": 0.0}, kind=WeightNoise)
ROUND = Outside("Rounding", arguments={"include": LAYERS}, neutral="It always rounds.", kind=Rounding)
BOTH = pytest.mark.parametrize("technique", [NOISE, ROUND], ids=str)
OF_THE_FIRST = guarantees.OF_THE_FIRST - {guarantees.FROZEN}
ALONE = [check for check in CHECKS.values() if guarantees.is_held_to(NOISE, check) or check.name in OF_THE_FIRST]


def sparse(recipe: str = "mdgf-exponential", **arguments: Any) -> NMSparsity:
    return NMSparsity("1:4", recipe, include=LAYERS, figure=False, **arguments)


# Alone: the contract of every exported technique.


@BOTH
@pytest.mark.parametrize("check", ALONE, ids=str)
def test_guarantee(technique: Technique, check: Check) -> None:
    guarantees.test_guarantee(technique, check)


@BOTH
def test_it_acts(technique: Technique) -> None:
    guarantees.test_technique_is_not_neutral_otherwise(technique)
    guarantees.test_frozen_weights_that_are_not_named_stay_what_they_are(technique)
    checkpoints.test_callback_state_is_made_of_plain_types(technique)
    resume.test_an_on_exception_checkpoint_holds_what_save_on_exception_does(technique)


@BOTH
@pytest.mark.parametrize("ema_first", [False, True])
def test_resume_beside_weight_averaging(technique: Technique, ema_first: bool, tmp_path: Path) -> None:
    resume.test_resume_beside_weight_averaging(technique, ema_first, tmp_path)


def test_two_ranks_agree_and_shards_are_refused() -> None:
    guarantees.test_guarantee(NOISE, CHECKS["g6_two_ranks"])
    composition.test_sharded_strategies_work_or_are_refused_before_the_first_batch(NOISE, "FSDPStrategy")


def test_the_guide_shows_the_same_noise_in_at_most_sixty_lines() -> None:
    page = (Path(__file__).parents[2] / "docs" / "adding_a_technique.md").read_text()
    sources = [inspect.getsource(NoisyWeight), inspect.getsource(WeightNoise)]
    assert all(source in page for source in sources)
    assert sum(source.count("\n") for source in sources) <= 60
    imported = re.findall(r"^from lightning_grad\S* import", inspect.getsource(weight_techniques), re.MULTILINE)
    assert imported == ["from lightning_grad.core import"]


def test_wrong_arguments_raise() -> None:
    with pytest.raises(ValueError, match=r"std must be at least 0; got -1"):
        WeightNoise(std=-1.0)


# Several on one weight.

PAIRS: dict[str, Any] = {
    "sparse and noisy": lambda: [sparse(), WeightNoise(include=LAYERS)],
    "sparse and round": lambda: [sparse("sdgf-stepwise", gradient="masked"), Rounding(include=LAYERS)],
    # An explicit decay is known only when the length of the run is, after the round weights have been made.
    "mask every 4": lambda: [sparse(mask_every_n_steps=4, decay=0.3), Rounding(include=LAYERS)],
    "all three": lambda: [sparse("sr-ste"), Rounding(include=LAYERS), WeightNoise(include=["hidden", "head", "mix.w"])],
}
CHAINS = pytest.mark.parametrize("make", PAIRS.values(), ids=PAIRS)


def state(callbacks: list[Any], **arguments: Any) -> dict[str, Any]:
    run, module = fit(callbacks, make_classifier(), resumable=True, **arguments)
    state = {**state_of(run, module), "steps": run.global_step}
    state.pop("random")  # Lightning restores no random state
    return state


@pytest.mark.parametrize(
    ("make", "manual"),
    [*(pytest.param(make, False, id=name) for name, make in PAIRS.items()), (PAIRS["all three"], True)],
)
def test_order_in_the_list_makes_no_difference(make: Any, manual: bool, tmp_path: Path) -> None:
    def files(callbacks: list[Any], folder: Path) -> tuple[Any, list[Any]]:
        saving = ModelCheckpoint(folder, save_top_k=-1)
        run, module = fit([*callbacks, saving], make_classifier(manual=manual), max_epochs=2)
        found = [torch.load(path, weights_only=True) for path in sorted(folder.glob("*.ckpt"))]
        for checkpoint in found:
            checkpoint["callbacks"] = {k: v for k, v in checkpoint["callbacks"].items() if "Checkpoint" not in k}
        return state_of(run, module), found

    one, other = files(make(), tmp_path / "a"), files(make()[::-1], tmp_path / "b")
    assert_identical(one[0], other[0])
    for left, right in zip(one[1], other[1], strict=True):
        assert_identical(left["state_dict"], right["state_dict"])
        assert_identical(left["callbacks"], {key: right["callbacks"][key] for key in left["callbacks"]})


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_chain_gives_the_same_weights() -> None:
    _, eager = fit(PAIRS["all three"](), max_epochs=2)
    module = make_classifier()
    torch._dynamo.reset()
    for layer in (module.hidden, module.encoder):
        layer.compile(backend="eager")
    fit(PAIRS["all three"](), module, max_epochs=2)
    for name, value in eager.state_dict().items():
        assert torch.allclose(value, module.state_dict()[name], atol=1e-6), name


@pytest.mark.parametrize("turned", [False, True])
def test_both_learn_the_ends_from_the_first_batch(turned: bool, tmp_path: Path) -> None:
    def run(*more: Any, **arguments: Any) -> tuple[Any, list[str]]:
        module, pair = Regression(Backwards()), [NMSparsity("1:4", "sr-ste", figure=False), Rounding()]
        trainer(*(pair[::-1] if turned else pair), *more, enable_checkpointing=True, max_epochs=2).fit(
            module, data(), **arguments
        )
        assert {type(layer) for layer in module.net.children()} == {nn.Linear, InOut}
        return module.state_dict(), sorted(pair[1].signatures)

    whole, chosen = run(ModelCheckpoint(tmp_path, save_top_k=-1))
    assert chosen == ["net.late.weight", "net.mid.weight"]
    for name, dim in (("net.late.weight", 1), ("net.mid.weight", 0)):
        assert is_nm(whole[name], 1, 4, dim)
        assert torch.equal(whole[name], (whole[name] / 0.05).round().mul(0.05).clamp(-0.2, 0.2))
    assert_identical(
        whole, run(ModelCheckpoint(tmp_path, save_top_k=-1), ckpt_path=tmp_path / "epoch=0-step=20.ckpt")[0]
    )


@CHAINS
@pytest.mark.filterwarnings("ignore:.*the best checkpoint")  # no checkpoint is saved at the end
@pytest.mark.parametrize(("turned", "accumulate"), [(False, 1), (True, 2)])
def test_a_chain_resumes_bitwise(make: Any, turned: bool, accumulate: int, tmp_path: Path) -> None:
    def build() -> list[Any]:
        return make()[::-1] if turned else make()

    run = {"accumulate_grad_batches": accumulate, "max_epochs": 3}
    saving = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=7)
    expected = state([*build(), saving], **run)
    stop = [StopAfter(5), OnExceptionCheckpoint(tmp_path, "stop")]
    with pytest.raises(RuntimeError):
        fit([*build(), *stop], make_classifier(), resumable=True, **run)
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) == 1 + 18 // accumulate // 7
    for path in paths:
        assert_identical(expected, state(build(), ckpt=path, **run), path.name)


class MeasuredWeight(RoundedWeight):
    """On a grid that is measured when the fit begins, and kept from then on."""

    def refresh(self) -> None:
        self.step_size = float(self.incoming.abs().mean()) / 4
        self.step()

    def step(self) -> None:
        super().refresh()

    def state_dict(self) -> dict[str, Any]:
        return {"step_size": self.step_size}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step_size = state["step_size"]
        self.step()


class MeasuredRounding(Rounding):
    """Round weights to grids of their own."""

    def view(self, found: FoundWeight) -> MeasuredWeight:
        return MeasuredWeight(found, self.step_size, self.limit)


@pytest.mark.parametrize("turned", [False, True])
def test_a_later_stage_resumes_from_its_state_wherever_it_stands(turned: bool, tmp_path: Path) -> None:
    def build() -> list[Any]:
        pair = [sparse(), MeasuredRounding(include=LAYERS)]
        return pair[::-1] if turned else pair

    expected = state([*build(), ModelCheckpoint(tmp_path, save_top_k=-1)], max_epochs=2)
    first = tmp_path / "epoch=0-step=6.ckpt"
    assert_identical(expected, state(build(), ckpt=first, max_epochs=2))


def test_the_sanity_check_sees_the_whole_chain_in_either_order() -> None:
    def checked(callbacks: list[Any]) -> list[Tensor]:
        class Keep(pl.Callback):
            def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
                found.extend(pl_module.validated if trainer.sanity_checking else [])

        found: list[Tensor] = []
        fit([*callbacks, Keep()], max_epochs=1)
        return found

    pair = [sparse("ste"), MeasuredRounding(include=LAYERS)]
    assert_identical(checked(pair), checked(pair[::-1]))


@CHAINS
@pytest.mark.parametrize("averaged", [False, True])
def test_a_chains_checkpoint_computes_what_was_validated(make: Any, averaged: bool) -> None:
    others = [EMAWeightAveraging(decay=0.8)] if averaged else []
    run = PLAIN.run_and_save([*make()[::-1], *others], ["epochs"], copying=False, max_epochs=2)
    assert len(run.saved("epochs")) == 2
    assert_as_validated(PLAIN, run.saved("epochs"), run.watch.of)


@pytest.mark.parametrize("turned", [False, True])
def test_file_and_module_hold_what_the_whole_chain_stores_and_one_residual(turned: bool, tmp_path: Path) -> None:
    callbacks = PAIRS["sparse and round"]()
    _, module = fit([*(callbacks[::-1] if turned else callbacks), ModelCheckpoint(tmp_path)], max_epochs=2)
    checkpoint = torch.load(next(tmp_path.glob("*.ckpt")), weights_only=True)
    residuals = {key: value["residuals"] for key, value in checkpoint["callbacks"].items() if "residuals" in value}
    assert residuals["Rounding"] == {}
    assert sorted(residuals["NMSparsity"]["state_dict"]) == sorted(NAMES)
    for stored in (checkpoint["state_dict"], module.state_dict()):
        for name in NAMES:
            weight = stored[name]
            assert is_nm(weight, 1, 4), name
            assert torch.equal(weight, (weight / 0.05).round().mul(0.05).clamp(-0.2, 0.2)), name
            assert weight.unique().numel() > 3, name


def test_neutral_noise_leaves_a_sparse_run_as_it_is() -> None:
    alone = state([sparse()], max_epochs=2)
    assert_identical(alone, state([WeightNoise(std=0.0, include=LAYERS), sparse()], max_epochs=2))


@CHAINS
@pytest.mark.parametrize("how", ["success", "exception", "interrupt"])
def test_nothing_is_left_of_a_chain(make: Any, how: str) -> None:
    if how == "success":
        assert_nothing_is_left(PLAIN.run(make()[::-1], max_epochs=2), PLAIN.bare())
    else:
        assert_nothing_is_left(PLAIN.break_off(make()[::-1], how), PLAIN.broken(how))


def test_two_of_one_stage_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"WeightNoise\[b\] and another technique both choose mix.w \(Mix\).*include="):
        fit([WeightNoise(include=LAYERS, name="a"), WeightNoise(include=["mix.w"], name="b")])
    fit([WeightNoise(include=["hidden"], name="a"), sparse(), WeightNoise(include=["mix.w"], name="b")], max_epochs=1)


@pytest.mark.parametrize("turned", [False, True])
def test_a_later_stage_sees_what_the_earlier_ones_show_now(turned: bool) -> None:
    seen: list[str] = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            for weight in rounding.weights:
                before = nm.weights[NAMES.index(weight.name)]
                shown = weight.stored(before.value(before.parameter.detach()))
                assert torch.equal(weight.chain.value(weight.parameter).detach(), shown), weight.name
                seen.append(weight.name)

    nm, rounding = sparse(), Rounding(include=LAYERS)
    fit([*([rounding, nm] if turned else [nm, rounding]), Look()], max_epochs=2)
    assert len(seen) == 12 * len(NAMES)


def test_a_loaded_weight_reaches_all_stages() -> None:
    other = {name: value * 1.5 for name, value in make_classifier().state_dict().items()}
    seen: list[bool] = []

    class Load(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 5:
                pl_module.load_state_dict(other)

    class Compare(pl.Callback):
        def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            if trainer.global_step == 5:
                dense = other["hidden.weight"]
                seen.append(torch.equal(pl_module.hidden.weight.detach(), rounded(dense * nm_mask(dense, 1, 4))))

    rounded = RoundedWeight(FoundWeight("w", nn.Linear(1, 1), "weight"), 0.05, 0.2).stored
    fit([Load(), Rounding(include=LAYERS), sparse("ste"), Compare()], max_epochs=1)
    assert seen == [True]


def test_an_optimizer_that_takes_anothers_place_is_followed() -> None:
    class Replace(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            trainer.strategy.optimizers = [torch.optim.SGD(pl_module.parameters(), lr=0.1, momentum=0.9)]

    def run(optimizer: Any, *others: Any) -> dict[str, Tensor]:
        module = Regression(nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8)), optimizer)
        trainer(NMSparsity("1:4", include=["*"], figure=False), *others).fit(module, data())
        return module.state_dict()

    torch.manual_seed(0)
    expected = run(lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9))
    torch.manual_seed(0)
    assert_identical(expected, run(torch.optim.Adam, Replace()))
    assert is_nm(expected["net.0.weight"], 1, 4)


def test_a_look_at_the_module_in_between_changes_nothing() -> None:
    class Look(pl.Callback):
        def __init__(self, evaluate: bool) -> None:
            self.evaluate = evaluate

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            with quiet(trainer, pl_module, evaluate=self.evaluate), torch.enable_grad():
                pl_module.training_step(batch, batch_idx).backward()

    plain = state(PAIRS["all three"](), max_epochs=2)
    for evaluate in (False, True):
        looked = state([*PAIRS["all three"](), Look(evaluate)], max_epochs=2)
        assert_identical(plain, looked, f"evaluate={evaluate}")


def test_a_weight_that_somebody_else_shows_is_refused() -> None:
    module = make_classifier()
    undo = attach_view(module.hidden, "weight", ViewedWeight(FoundWeight("hidden.weight", module.hidden, "weight")))
    with pytest.raises(ValueError, match=r"WeightNoise and another technique both choose hidden.weight \(Linear\)"):
        fit([WeightNoise(include=["hidden"])], module)
    undo()


# The gradient of a chain.


class Shrunk(ViewedWeight):
    """Computes its mask from the value, in every call."""

    def value(self, weight: Tensor) -> Tensor:
        return torch.where(weight.abs() > 0.1, weight, 0.0)


@pytest.mark.parametrize("in_place", [False, True])
def test_the_gradient_passes_through_all_stages(in_place: bool) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 8, bias=False), torch.randn(5, 8)
    found = FoundWeight("weight", layer, "weight", is_known=not in_place)
    window = InPlaceWindow(pl.LightningModule(), [])
    chain, rounded = Chain(found), RoundedWeight(found, 0.05, 0.2)
    chain.join(Stage.QUANTIZATION, rounded, lambda: window)
    chain.join(Stage.SPARSITY, Shrunk(found), lambda: window)
    rounded.refresh()
    dense = layer._parameters["weight"].detach().clone()
    window.open()
    layer(x).square().sum().backward()
    window.close()
    shown = rounded.stored(torch.where(dense.abs() > 0.1, dense, 0.0))
    passes = (dense.abs() > 0.1) & (dense.abs() <= 0.2)
    assert 0.1 < passes.float().mean() < 0.9
    torch.testing.assert_close(layer._parameters["weight"].grad, 2 * (x @ shown.T).T @ x * passes)
    assert torch.equal(layer._parameters["weight"], dense)
