"""The base of what changes gradients: order, refusals, thresholds, several optimizers, logs."""

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_grad.callbacks import (
    AdaptiveGradientClipping,
    AutoClip,
    GradientCentralization,
    GradientNoise,
    LayerwiseClipping,
    LayerwiseNormalization,
    MomentumReset,
    NormClipping,
    SkipNonFinite,
    SpikeClipping,
    ValueClipping,
    ZClip,
)
from lightning_grad.testing import assert_identical, fit, loaders, make_classifier, make_trainer, state_of
from tests.callbacks.clipping import (
    Dictated,
    Gradients,
    Regression,
    pairs,
    rows_of,
    rows_with_norms,
    small_net,
    train,
)

INF = float("inf")


class NoBatch(pl.Callback):
    def on_train_batch_start(self, *_: Any) -> None:
        raise AssertionError("a batch was trained before the refusal")


# The order of roles.


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        (
            lambda: [GradientNoise(), NormClipping()],
            r"\[NormClipping \(clip\), GradientNoise \(noise\)\]",
        ),
        (
            lambda: [ZClip(), pl.Callback(), SkipNonFinite()],
            r"\[SkipNonFinite \(guard\), ZClip \(clip\)\]",
        ),
        (
            lambda: [ValueClipping(), GradientCentralization()],
            r"\[GradientCentralization \(center\), ValueClipping \(clip\)\]",
        ),
        (
            lambda: [GradientCentralization(), SkipNonFinite()],
            r"\[SkipNonFinite \(guard\), GradientCentralization \(center\)\]",
        ),
        (
            lambda: [GradientNoise(), NormClipping(include=["hidden"], name="b"), AutoClip(), SkipNonFinite()],
            r"\[SkipNonFinite \(guard\), NormClipping\[b\] \(clip\), AutoClip \(clip\), GradientNoise \(noise\)\]",
        ),
    ],
)
def test_wrong_order_raises_and_shows_the_right_one(wrong, right) -> None:
    said = f"in the order guard, center, clip, noise, observe.*Write callbacks={right}"
    with pytest.raises(ValueError, match=said):
        fit([NoBatch(), *wrong()])


@pytest.mark.parametrize(
    "callbacks",
    [
        lambda: [SkipNonFinite(), GradientCentralization(), NormClipping(), GradientNoise()],
        lambda: [GradientNoise(), MomentumReset(), pl.Callback()],
        lambda: [MomentumReset(), SkipNonFinite(), ValueClipping(), MomentumFree()],
    ],
)
def test_right_order_passes(callbacks) -> None:
    trainer, _ = fit(callbacks(), max_epochs=1)
    assert trainer.global_step == 6


class MomentumFree(pl.Callback):
    """A callback of somebody else, with a role that means something else."""

    role = "warmup"


# The trainer's own clipping.


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_trainer_that_clips_beside_a_clipper_is_refused(algorithm) -> None:
    said = (
        r"ZClip and Trainer\(gradient_clip_val=0.3\) would both clip.*drop the callback, or set gradient_clip_val=None"
    )
    with pytest.raises(ValueError, match=said):
        fit([NoBatch(), ZClip()], gradient_clip_val=0.3, gradient_clip_algorithm=algorithm)


def test_trainer_that_would_clip_the_noise_is_refused() -> None:
    said = (
        r"GradientNoise must come after clipping.*NormClipping\(max_norm=0.3\) before it and set gradient_clip_val=None"
    )
    with pytest.raises(ValueError, match=said):
        fit([NoBatch(), GradientNoise()], gradient_clip_val=0.3)


class TurnsClippingOff(pl.Callback):
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        trainer.gradient_clip_val = None


@pytest.mark.parametrize("where", ["on the trainer", "by a callback before it", "by a callback behind it"])
@pytest.mark.parametrize("callback", [ZClip, GradientNoise])
def test_a_trainer_that_a_library_built_has_a_way_out(callback, where) -> None:
    """A library may set gradient_clip_val on a Trainer that its user cannot build."""
    off = [TurnsClippingOff()]
    before, behind = (off if where == f"by a callback {side} it" else [] for side in ("before", "behind"))
    trainer = make_trainer(callbacks=[*before, callback(), *behind], gradient_clip_val=0.3, max_epochs=1)
    if where == "on the trainer":
        trainer.gradient_clip_val = None
    if where == "by a callback behind it":
        said = (
            r"set trainer.gradient_clip_val = None before fit\(\), or in the setup\(\) of a callback that comes before"
        )
        with pytest.raises(ValueError, match=said):
            trainer.fit(make_classifier(), *loaders())
        return
    trainer.fit(make_classifier(), *loaders())
    expected = state_of(*fit([callback()], max_epochs=1))
    assert_identical(state_of(trainer, trainer.lightning_module), expected)


@pytest.mark.parametrize("callback", [GradientCentralization, SkipNonFinite])
def test_trainer_that_clips_after_a_guard_or_a_center_is_right(callback) -> None:
    trainer, _ = fit([callback()], gradient_clip_val=0.3, max_epochs=1)
    assert trainer.global_step == 6


@pytest.mark.parametrize("value", [None, 0.0])
def test_trainer_that_does_not_clip_passes(value) -> None:
    trainer, _ = fit([NormClipping()], gradient_clip_val=value, max_epochs=1)
    assert trainer.global_step == 6


# Two that clip.


def test_two_clippers_of_the_same_gradients_warn() -> None:
    with pytest.warns(UserWarning, match=r"NormClipping and ZClip both clip the same gradients.*set include="):
        fit([NormClipping(), ZClip()], max_epochs=1)


def test_clippers_of_different_gradients_do_not_warn() -> None:
    fit([NormClipping(include=["head"]), ZClip(exclude=["head"])], max_epochs=1)


def test_clippers_that_share_one_parameter_warn() -> None:
    with pytest.warns(UserWarning, match="NormClipping and ValueClipping both clip"):
        fit([NormClipping(include=["head"]), ValueClipping(include=["head.bias"])], max_epochs=1)


class ClipsItself(Regression):
    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        nn.utils.clip_grad_value_(self.parameters(), 0.5)


def test_a_module_that_clips_by_itself_warns() -> None:
    said = r"ClipsItself overrides configure_gradient_clipping, which runs after NormClipping"
    with pytest.warns(UserWarning, match=said):
        train([NormClipping()], ClipsItself(small_net()), pairs())


@pytest.mark.parametrize("callback", [GradientCentralization, SkipNonFinite, GradientNoise])
def test_a_module_that_clips_by_itself_is_nothing_to_those_that_do_not_clip(callback) -> None:
    train([callback()], ClipsItself(small_net()), pairs())


# Clipping by the trainer and by the callback.


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(("algorithm", "callback"), [("norm", NormClipping), ("value", ValueClipping)])
def test_clipping_is_that_of_the_trainer_bit_for_bit(algorithm, callback, accumulate) -> None:
    bound, arguments = {"norm": 0.3, "value": 0.01}[algorithm], {"accumulate_grad_batches": accumulate, "max_epochs": 2}
    expected = state_of(*fit([], gradient_clip_val=bound, gradient_clip_algorithm=algorithm, **arguments))
    found = state_of(*fit([callback(bound)], **arguments))
    plain = state_of(*fit([], **arguments))
    assert_identical(expected, found)
    assert not torch.equal(plain["module"]["head.weight"], found["module"]["head.weight"])


def test_accumulated_gradients_are_clipped_once() -> None:
    rows = rows_with_norms([3.0] * 7)
    callback, after = NormClipping(1.0), Gradients()
    train([callback, after], Dictated(), rows_of(rows), accumulate_grad_batches=3)
    sums = [rows[:3].sum(0) / 3, rows[3:6].sum(0) / 3, rows[6:].sum(0) / 3]
    expected = [g * min(1.0, 1.0 / g.norm().item()) for g in sums]
    torch.testing.assert_close([step["w"] for step in after.seen], expected, rtol=1e-5, atol=0)
    assert callback.state_dict()["optimizers"]["0"]["steps"] == 3


# Thresholds.


class Grouped(Regression):
    """Its first layer is a group with a threshold of its own, which may change in mid-fit."""

    def __init__(self, key: str, values: list[float]) -> None:
        super().__init__(small_net())
        self.key, self.values = key, values

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.trainer.optimizers[0].param_groups[0][self.key] = self.values[batch_idx]

    def configure_optimizers(self) -> Any:
        first = {"params": self.net[0].parameters(), self.key: self.values[0]}
        return torch.optim.SGD([first, {"params": self.net[2].parameters()}], lr=0.05)


FIRST, LAST = ("net.0.weight", "net.0.bias"), ("net.2.weight", "net.2.bias")


def test_a_param_group_has_its_own_threshold_and_changes_it() -> None:
    values = [1e-3, 1e-3, 1e-4, 1e-5, INF, 1e-3]
    before, after = Gradients(), Gradients()
    train([before, NormClipping(1e-2), after], Grouped("max_norm", values), pairs())
    assert min(before.norms(*FIRST)) > 1e-2
    expected = [min(norm, value) for norm, value in zip(before.norms(*FIRST), values, strict=True)]
    assert after.norms(*FIRST) == pytest.approx(expected, rel=1e-3)
    assert after.norms(*LAST) == pytest.approx([1e-2] * 6, rel=1e-3)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_a_param_group_with_an_impossible_threshold_is_refused(value) -> None:
    with pytest.raises(ValueError, match=f"max_norm must be above 0; got {value}"):
        train([NoBatch(), NormClipping(1.0)], Grouped("max_norm", [value]), pairs())


def test_a_param_group_without_the_key_has_the_callbacks_threshold() -> None:
    before, after = Gradients(), Gradients()
    train([before, ValueClipping(1e-3), after], Grouped("max_norm", [1e-6] * 6), pairs())
    for raw, clipped in zip(before.seen, after.seen, strict=True):
        for name in (*FIRST, *LAST):
            assert torch.equal(clipped[name], raw[name].clamp(-1e-3, 1e-3)), name


def test_each_name_pattern_has_its_norm_and_no_match_is_left_alone() -> None:
    before, after = Gradients(), Gradients()
    patterns = {"net.0.bias": 1e-4, "net.0.*": 1e-3, "net.0": 1.0, "net.2.bias": 1e-2}
    train([before, NormClipping(patterns), after], Regression(small_net()), pairs())
    assert after.norms("net.0.bias") == pytest.approx([1e-4] * 6, rel=2e-2)  # 1e-6 is added to the norm
    assert after.norms("net.0.weight") == pytest.approx([1e-3] * 6, rel=2e-3)
    assert after.norms("net.2.bias") == pytest.approx([1e-2] * 6, rel=2e-4)
    for raw, clipped in zip(before.seen, after.seen, strict=True):
        assert torch.equal(raw["net.2.weight"], clipped["net.2.weight"])


def test_a_pattern_that_matches_nothing_raises() -> None:
    with pytest.raises(ValueError, match=r"NormClipping\(max_norm=...\): no parameter or module is named 'net.7'"):
        train([NoBatch(), NormClipping({"net.7": 1.0, "*": 2.0})], Regression(small_net()), pairs())


def test_include_and_exclude_leave_the_rest_bitwise_alone() -> None:
    before, after = Gradients(), Gradients()
    train([before, NormClipping(1e-3, include=["net.*"], exclude=["net.2"]), after], Regression(small_net()), pairs())
    assert after.norms(*FIRST) == pytest.approx([1e-3] * 6, rel=2e-3)
    for raw, clipped in zip(before.seen, after.seen, strict=True):
        assert all(torch.equal(raw[name], clipped[name]) for name in LAST)


# Which parameters.


class Grows(Regression):
    """A layer joins the optimizer in mid-fit, as finetuning callbacks let it."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3:
            self.trainer.optimizers[0].add_param_group({"params": self.net[2].parameters()})

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net[0].parameters(), lr=0.05)


@pytest.mark.parametrize("make", [lambda: NormClipping(1e-3), lambda: NormClipping({"*": 1e-3})])
def test_parameters_added_in_mid_fit_are_clipped(make) -> None:
    after, callback = Gradients(), make()
    train([callback, after], Grows(small_net()), pairs())
    assert [len(step) for step in after.seen] == [2, 2, 2, 4, 4, 4]
    assert after.norms() == pytest.approx([1e-3] * 6, rel=2e-3)
    assert callback.state_dict()["optimizers"]["0"]["steps"] == 6


class HalfUsed(Regression):
    """One layer is never used, one is frozen."""

    def __init__(self) -> None:
        super().__init__(small_net())
        self.net.append(nn.Linear(3, 3))
        self.net[0].requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self.net[:3](batch[0]), batch[1])


@pytest.mark.parametrize(
    "callback",
    [
        NormClipping(1e-3),
        ValueClipping(1e-5),
        AutoClip(),
        ZClip(max_norm=1e-3),
        AdaptiveGradientClipping(head=None),
        LayerwiseClipping(1e-3),
        LayerwiseNormalization(),
        GradientNoise(),
        GradientCentralization(),
        SkipNonFinite(),
    ],
    ids=lambda callback: callback.display_name,
)
def test_parameters_without_a_gradient_are_passed_over(callback) -> None:
    before, after, module = Gradients(), Gradients(), HalfUsed()
    start = {name: value.clone() for name, value in module.state_dict().items()}
    around = [callback] if callback.role == "guard" else [before, callback, after]
    train(around, module, pairs())
    for name, value in module.state_dict().items():
        assert torch.equal(value, start[name]) == (not name.startswith("net.2")), name
    if len(around) == 3 and callback.display_name not in ("AutoClip",):
        assert any(not torch.equal(a[n], b[n]) for a, b in zip(before.seen, after.seen, strict=True) for n in a)


class Words(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(10, 4, sparse=True), nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.head(self.words(batch[0])).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_sparse_embedding_is_refused_by_name_and_can_be_left_out() -> None:
    tokens = DataLoader(TensorDataset(torch.arange(8)), 4)
    with pytest.raises(ValueError, match=r"NormClipping needs dense gradients.*'words'.*exclude=\['words'\]"):
        train([NoBatch(), NormClipping()], Words(), tokens)
    trainer = train([NormClipping(exclude=["words"])], Words(), tokens)
    assert trainer.global_step == 2


# Fused optimizers and loss scales.


def fused(parameters: Any) -> Any:
    return torch.optim.AdamW(parameters, lr=1e-2, fused=True)


def test_fused_optimizer_beside_a_grad_scaler_is_refused() -> None:
    scaling = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    said = "NormClipping reads gradients, and the fused AdamW leaves them multiplied by the fp16 loss scale"
    with pytest.raises(ValueError, match=said):
        train([NoBatch(), NormClipping()], Regression(small_net(), fused), pairs(), plugins=[scaling])


def test_fused_optimizer_in_bf16_is_clipped_where_the_trainer_refuses_to() -> None:
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        train([], Regression(small_net(), fused), pairs(), precision="bf16-mixed", gradient_clip_val=1e-3)
    after = Gradients()
    train([NormClipping(1e-3), after], Regression(small_net(), fused), pairs(), precision="bf16-mixed")
    assert after.norms() == pytest.approx([1e-3] * 6, rel=2e-3)


def test_scaled_gradients_are_clipped_after_they_are_unscaled() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    after = Gradients()
    plugins = [MixedPrecision("16-mixed", "cpu", scaler)]
    train([NormClipping(0.5), after], Dictated(), rows_of(rows_with_norms([0.25, 2.0, 1.0])), plugins=plugins)
    assert after.norms() == pytest.approx([0.25, 0.5, 0.5], rel=1e-3)


@pytest.mark.parametrize(
    "make",
    [
        NormClipping,
        ValueClipping,
        lambda: AdaptiveGradientClipping(head=None),
        AutoClip,
        ZClip,
        LayerwiseClipping,
        LayerwiseNormalization,
        SpikeClipping,
        GradientNoise,
        GradientCentralization,
        SkipNonFinite,
    ],
)
def test_double_precision(make) -> None:
    module = Regression(small_net(), lambda p: torch.optim.Adam(p, lr=1e-2))
    train([make()], module, pairs(), precision="64-true", log_every_n_steps=1)
    assert {p.dtype for p in module.parameters()} == {torch.float64}
    assert all(p.isfinite().all() for p in module.parameters())


# Several optimizers.


class Gan(pl.LightningModule):
    """Two optimizers step on every batch; the gradients of the first are data, those of the second ten times that."""

    def __init__(self, past_lightning: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.past_lightning = past_lightning
        self.generator, self.critic = nn.Linear(4, 1, bias=False), nn.Linear(4, 1, bias=False)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer, net, factor in zip(self.optimizers(), (self.generator, self.critic), (1.0, 10.0), strict=True):
            optimizer.zero_grad()
            self.manual_backward(net(batch[0]).sum() * factor)
            optimizer.optimizer.step() if self.past_lightning else optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(net.parameters(), lr=0.1) for net in (self.generator, self.critic)]


def test_each_optimizer_has_statistics_of_its_own() -> None:
    norms = [1.0, 2.0, 3.0, 4.0]
    callback, loader = ZClip(max_norm=None), rows_of(rows_with_norms(norms))
    train([callback], Gan(), loader)
    memory = callback.state_dict()["optimizers"]
    for index, factor in (("0", 1.0), ("1", 10.0)):
        assert memory[index]["steps"] == 4
        state = memory[index]["states"][""]
        assert state["count"].item() == 4, "one for each batch, and not one for each step of any optimizer"
        assert state["mean"].item() == pytest.approx(factor * 2.5, rel=1e-6)
        assert state["variance"].item() == pytest.approx(factor**2 * 1.25, rel=1e-6)


def test_each_optimizer_is_clipped_by_its_own_norm() -> None:
    after = Gradients()
    train([NormClipping(5.0), after], Gan(), rows_of(rows_with_norms([1.0, 2.0, 3.0, 4.0])))
    assert after.norms() == pytest.approx([1.0, 5.0, 2.0, 5.0, 3.0, 5.0, 4.0, 5.0], rel=1e-5)


def test_steps_past_lightning_warn_once() -> None:
    with pytest.warns(UserWarning, match=r"NormClipping: an optimizer stepped without Lightning's hooks") as caught:
        train([NormClipping()], Gan(past_lightning=True), rows_of(rows_with_norms([1.0] * 4)))
    assert sum("Lightning's hooks" in str(warning.message) for warning in caught) == 1


def test_a_step_past_lightning_after_a_right_one_warns() -> None:
    class Turns(Gan):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.past_lightning = batch_idx == 2
            super().training_step(batch, batch_idx)

    module = Turns()
    with pytest.warns(UserWarning, match="stepped without Lightning's hooks"):
        train([ZClip()], module, rows_of(rows_with_norms([1.0] * 4)))


def test_steps_through_lightning_do_not_warn_with_several_callbacks() -> None:
    train(
        [SkipNonFinite(), NormClipping(include=["critic"]), ZClip(include=["generator"]), GradientNoise()],
        Gan(),
        rows_of(rows_with_norms([1.0] * 4)),
    )


def test_one_optimizer_may_be_left_alone() -> None:
    after, callback = Gradients(), ZClip(max_norm=0.5, include=["critic"])
    train([callback, after], Gan(), rows_of(rows_with_norms([1.0, 2.0])))
    assert after.norms() == pytest.approx([1.0, 0.5, 2.0, 0.5], rel=1e-5)
    assert callback.state_dict()["optimizers"]["0"]["states"] == {}


def test_a_fused_optimizer_is_refused_only_where_its_gradients_are_changed() -> None:
    class FusedGenerator(Gan):
        def configure_optimizers(self) -> Any:
            return [fused(self.generator.parameters()), torch.optim.SGD(self.critic.parameters(), lr=0.1)]

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plugins, after = [MixedPrecision("16-mixed", "cpu", scaler)], Gradients()
    loader = rows_of(rows_with_norms([1.0, 2.0]))
    train([NormClipping(0.5, include=["critic"]), after], FusedGenerator(), loader, plugins=plugins)
    assert after.norms()[1::2] == pytest.approx([0.5, 0.5], rel=1e-3)
    with pytest.raises(ValueError, match="the fused AdamW leaves them multiplied"):
        train([NormClipping(0.5, include=["generator"])], FusedGenerator(), loader, plugins=plugins)


@pytest.mark.filterwarnings("ignore:NormClipping has nothing to act on yet")
def test_a_fused_optimizer_is_refused_when_it_gets_its_first_parameters_in_mid_fit() -> None:
    class FusedGrows(Grows):
        def configure_optimizers(self) -> Any:
            return fused(self.net[0].parameters())

    plugins = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))]
    with pytest.raises(ValueError, match="the fused AdamW leaves them multiplied"):
        train([NormClipping(0.5, include=["net.2"])], FusedGrows(small_net()), pairs(), plugins=plugins)


# Logs.


def logged(callback: Any, module: Any, loader: DataLoader, prefix: str) -> dict[str, float]:
    trainer = train([callback], module, loader, log_every_n_steps=1)
    return {key: value.item() for key, value in trainer.callback_metrics.items() if key.startswith(prefix)}


def metrics_of(logger: CSVLogger) -> list[dict[str, str]]:
    with Path(logger.log_dir, "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_keys_of_one_optimizer() -> None:
    found = logged(NormClipping(1.0), Dictated(), rows_of(rows_with_norms([3.0])), "grad/")
    assert set(found) == {"grad/norm_clipping/norm", "grad/norm_clipping/clipped_share"}
    assert found["grad/norm_clipping/norm"] == pytest.approx(3.0), "before clipping"


def test_keys_of_two_optimizers() -> None:
    found = logged(NormClipping(1.0), Gan(), rows_of(rows_with_norms([3.0])), "grad/")
    base = "grad/norm_clipping/optimizer"
    assert set(found) == {f"{base}{i}/{key}" for i in (0, 1) for key in ("norm", "clipped_share")}
    assert found[f"{base}1/norm"] == pytest.approx(10 * found[f"{base}0/norm"])


def test_keys_of_a_named_instance() -> None:
    found = logged(NormClipping(1.0, name="mine"), Dictated(), rows_of(rows_with_norms([3.0])), "grad/")
    assert set(found) == {"grad/norm_clipping/mine/norm", "grad/norm_clipping/mine/clipped_share"}


def test_the_progress_bar_shows_what_is_asked_for() -> None:
    callback = NormClipping(1.0)
    callback.progress_bar = ["clipped_share"]
    trainer = train([callback], Dictated(), rows_of(rows_with_norms([3.0])), log_every_n_steps=1)
    assert set(trainer.progress_bar_metrics) & set(trainer.callback_metrics) == {"grad/norm_clipping/clipped_share"}
    assert "grad/norm_clipping/norm" in trainer.callback_metrics


def test_keys_of_name_patterns_and_groups() -> None:
    patterns = logged(NormClipping({"net.0": 1e-3, "*": 1.0}), Regression(small_net()), pairs(1), "grad_layers/")
    keys = {"norm/net.0", "norm/*", "clipped_share/net.0", "clipped_share/*"}
    assert set(patterns) == {f"grad_layers/norm_clipping/{key}" for key in keys}
    groups = logged(NormClipping(1e-3), Grouped("max_norm", [1e-3]), pairs(1), "grad")
    keys = {
        f"{section}/norm_clipping/{key}" for key in ("norm", "clipped_share") for section in ("grad", "grad_layers")
    }
    assert set(groups) == {f"{key}/group0" if "layers" in key else key for key in keys}


@pytest.mark.parametrize(
    ("callback", "norms", "shares"),
    [
        (lambda: NormClipping(1.0), [0.5, 2.0, 0.5, 0.5, 3.0], [0.0, 1 / 2, 1 / 3, 1 / 4, 2 / 5]),
        (lambda: ZClip(max_norm=1.0), [0.5, 2.0, 0.5, 0.5, 3.0], [0.0, 1 / 2, 1 / 3, 1 / 4, 2 / 5]),
        # Of two norms 1 and 2 the median is 1.5, of 1, 2 and 1 it is 1.
        (lambda: AutoClip(50.0), [1.0, 2.0, 1.0, 5.0, 5.0], [0.0, 1 / 2, 1 / 3, 2 / 4, 3 / 5]),
    ],
)
def test_the_share_of_clipped_steps(callback, norms, shares, tmp_path) -> None:
    logger, technique = CSVLogger(tmp_path), callback()
    train([technique], Dictated(), rows_of(rows_with_norms(norms)), logger=logger, log_every_n_steps=1)
    rows = metrics_of(logger)
    found = [float(row[key]) for row in rows for key in row if key.endswith("/clipped_share") and row[key]]
    assert found == pytest.approx([*shares, shares[-1]])  # the last is what a summary gets
    assert f"{technique.namespace}/clipped_share" in rows[0]


def test_the_final_share_is_of_all_optimizers_and_patterns(tmp_path) -> None:
    logger = CSVLogger(tmp_path)
    # The generator's norms are 0.2 and 0.4, the critic's 2 and 4: two of four are above 1.
    train([NormClipping(1.0)], Gan(), rows_of(rows_with_norms([0.2, 0.4])), logger=logger)
    rows = metrics_of(logger)
    assert [row["grad/norm_clipping/clipped_share"] for row in rows][-1] == "0.5"


def test_nothing_is_logged_between_log_steps(tmp_path) -> None:
    logger = CSVLogger(tmp_path)
    train([ZClip()], Dictated(), rows_of(rows_with_norms([1.0] * 6)), logger=logger, log_every_n_steps=3)
    rows = [row for row in metrics_of(logger) if row.get("grad/zclip/norm")]
    assert [int(row["step"]) for row in rows] == [2, 5]
    # Nor handed to Lightning, which would keep it for the end of the epoch.
    trainer = train([ZClip()], Dictated(), rows_of(rows_with_norms([1.0] * 2)), log_every_n_steps=3)
    assert not trainer.callback_metrics


# The memory.


def test_validating_between_fits_does_not_touch_the_memory() -> None:
    callback = ZClip()
    trainer = make_trainer(callbacks=[callback], max_epochs=1)
    train_loader, validation = loaders()
    module = make_classifier()
    trainer.fit(module, train_loader, validation)
    before = callback.state_dict()
    trainer.validate(module, validation, verbose=False)
    assert_identical(before, callback.state_dict())
    assert before["optimizers"]["0"]["states"][""]["count"].item() == 6


def test_a_saved_state_does_not_change_with_the_run() -> None:
    callback, saved = ZClip(), []

    class Save(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            saved.append(callback.state_dict())

    train([callback, Save()], Dictated(), rows_of(rows_with_norms([1.0, 2.0, 3.0])))
    assert [state["optimizers"]["0"]["states"][""]["count"].item() for state in saved] == [1, 2, 3]


# What is said when a fit begins.


def everything() -> nn.Sequential:
    return nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(16, 3))


@pytest.mark.parametrize(
    ("callback", "said"),
    [
        (NormClipping(), "NormClipping acts on 6 parameters."),
        (NormClipping(include=["net.4"]), "NormClipping acts on 2 parameters; 4 skipped (net.1.weight, "),
        (NormClipping(include=["net.4.bias"], name="b"), "NormClipping[b] acts on 1 parameter; 5 skipped"),
        (GradientCentralization(), "GradientCentralization acts on 2 parameters; 4 skipped (net.1.bias, "),
        (GradientCentralization(conv_only=True), "GradientCentralization acts on 1 parameter; 5 skipped"),
        (LayerwiseNormalization(), "LayerwiseNormalization acts on 2 parameters; 4 skipped"),
        (LayerwiseNormalization(vectors=True), "LayerwiseNormalization acts on 6 parameters."),
    ],
    ids=lambda value: getattr(value, "display_name", ""),
)
def test_it_says_how_many_gradients_it_changes(callback, said, monkeypatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr("lightning_grad.core.callback.rank_zero_info", lines.append)
    before, after = Gradients(), Gradients()
    train([before, callback, after], Regression(everything()), pairs())
    (line,) = lines
    assert line.startswith(said)
    count = int(line.split(" acts on ")[1].split()[0])
    if not isinstance(callback, NormClipping):
        changed = {n for a, b in zip(before.seen, after.seen, strict=True) for n in a if not torch.equal(a[n], b[n])}
        assert len(changed) == count
