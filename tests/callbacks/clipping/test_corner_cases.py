"""Ways of training that are seldom, and that a rule must not break or misread."""

import copy
import pickle
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import BaseFinetuning, GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_grad.callbacks import (
    AdaptiveGradientClipping,
    AutoClip,
    GradientCentralization,
    GradientMonitor,
    LayerwiseClipping,
    MomentumReset,
    NormClipping,
    SkipNonFinite,
    SpikeClipping,
    ValueClipping,
    ZClip,
)
from lightning_grad.testing import ResumableLoader, fit, make_classifier, make_trainer
from tests.contract.settings import CANONICAL

ALL = [technique for technique in CANONICAL if technique.name != "NMSparsity"]


class Small(pl.LightningModule):
    """Two linear layers on made-up data; its parts may be exchanged."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 1)
        for name, part in parts.items():
            setattr(self, name, part)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.head(F.relu(self.body(batch[0]))).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(0)
        return ResumableLoader(TensorDataset(torch.randn(24, 4, generator=generator)), 4)


def run(module: pl.LightningModule, *callbacks: Any, ckpt: Any = None, **arguments: Any) -> Any:
    arguments = {"max_epochs": 2, "log_every_n_steps": 1, **arguments}
    if any(isinstance(callback, ModelCheckpoint) for callback in callbacks):
        arguments["enable_checkpointing"] = True
    trainer = make_trainer(callbacks=list(callbacks), **arguments)
    trainer.fit(module, ckpt_path=ckpt)
    return trainer


def small(**parts: Any) -> Small:
    pl.seed_everything(1, verbose=False)
    return Small(**parts)


# Optimizers and their groups.


class OwnThresholds(Small):
    """Lowers the threshold in its param group as it goes."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([{"params": self.parameters(), "max_norm": 0.1}], lr=0.1)

    def on_train_batch_start(self, *_: Any) -> None:
        self.optimizers().param_groups[0]["max_norm"] = 0.1 * 0.7**self.global_step


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_threshold_in_a_group_is_still_read_at_every_step_after_a_resume(tmp_path):
    pl.seed_everything(1, verbose=False)
    whole = OwnThresholds()
    run(whole, NormClipping(), ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1))
    (path,) = tmp_path.glob("*step=5.ckpt")
    pl.seed_everything(1, verbose=False)
    resumed = OwnThresholds()
    run(resumed, NormClipping(), ckpt=path)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.parametrize("technique", ALL, ids=str)
def test_optimizers_that_are_set_up_anew_do_not_end_the_training(technique):
    class Anew(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                trainer.strategy.setup_optimizers(trainer)

    trainer, _ = fit([technique.build(), Anew()])
    assert trainer.current_epoch == 4


class Unfreeze(BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.body)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.body, optimizer)


class HeadFirst(Small):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def test_parameters_that_are_added_in_mid_fit_are_watched_and_clipped(tmp_path):
    pl.seed_everything(1, verbose=False)
    clipping = NormClipping(1e-4)
    trainer = run(HeadFirst(), Unfreeze(), clipping, GradientMonitor(), logger=CSVLogger(tmp_path))
    assert trainer.callback_metrics["grad/norm_after"].item() == pytest.approx(1e-4, rel=0.02)
    assert "grad_layers/norm/body" in trainer.callback_metrics


def test_a_rule_for_parameters_that_come_later_warns_and_then_acts():
    pl.seed_everything(1, verbose=False)
    clipping = NormClipping(include=["body"])
    with pytest.warns(UserWarning, match="nothing to act on yet"):
        run(HeadFirst(), Unfreeze(), clipping)
    assert clipping.state_dict()["optimizers"]["0"]["states"]


def test_a_step_with_an_optimizer_that_the_trainer_does_not_know_says_so():
    trainer, module = fit([], max_epochs=1)
    clipping = NormClipping()
    clipping.setup(trainer, module, "fit")
    foreign = torch.optim.SGD(module.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match="does not know"):
        clipping.on_before_optimizer_step(trainer, module, foreign)


# Thresholds that cannot be.


@pytest.mark.parametrize(
    "build",
    [NormClipping, ValueClipping, AdaptiveGradientClipping, AutoClip, LayerwiseClipping, SpikeClipping],
    ids=str,
)
def test_no_threshold_is_refused_in_the_constructor(build):
    with pytest.raises(TypeError, match=f"{build.threshold_name} must be a number"):
        build(**{build.threshold_name: None})
    with pytest.raises(ValueError, match="empty mapping"):
        build(**{build.threshold_name: {}})


@pytest.mark.parametrize(("value", "words"), [("1", "must be a number"), (-1.0, "above 0")])
def test_a_threshold_in_a_group_that_cannot_be_is_refused(value, words):
    module = small()
    module.configure_optimizers = lambda: torch.optim.SGD([{"params": module.parameters(), "max_norm": value}], lr=0.1)
    with pytest.raises((TypeError, ValueError), match=f"max_norm of the optimizer's group0 .*{words}|{words}"):
        run(module, NormClipping())


def test_none_in_a_group_turns_the_rule_off_there():
    class TwoGroups(Small):
        def configure_optimizers(self) -> Any:
            groups = [{"params": self.body.parameters(), "max_norm": None}, {"params": self.head.parameters()}]
            return torch.optim.SGD(groups, lr=0.1)

    pl.seed_everything(1, verbose=False)
    off = TwoGroups()
    run(off, NormClipping(1e-6), max_steps=1)
    pl.seed_everything(1, verbose=False)
    plain = TwoGroups()
    run(plain, max_steps=1)
    assert torch.equal(off.body.weight, plain.body.weight)
    assert not torch.equal(off.head.weight, plain.head.weight)


def test_counts_must_be_whole():
    with pytest.raises(TypeError, match=r"window must be an integer; got 2\.5"):
        AutoClip(window=2.5)


# Modules.


def test_a_head_that_is_itself_compiled_is_left_alone():
    clipping = AdaptiveGradientClipping(1e-9)
    module = small(head=torch.compile(nn.Linear(4, 1), backend="eager"))
    clipping.setup(trainer := make_trainer(), module, "fit")
    trainer.strategy._lightning_optimizers, trainer.strategy.optimizers = [], [module.configure_optimizers()]
    clipping.on_fit_start(trainer, module)
    names = [name for _, buckets in clipping._chosen.values() for bucket in buckets for name in bucket.names]
    assert names == ["body.weight", "body.bias"]


@pytest.mark.parametrize("build", [SkipNonFinite, GradientMonitor])
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_scripted_part_is_passed_over(build):
    run(small(body=torch.jit.script(nn.Linear(4, 4))), build(), max_epochs=1)


@pytest.mark.parametrize("build", [ValueClipping, SpikeClipping])
def test_complex_parameters_are_refused_by_name(build):
    class Complex(Small):
        def __init__(self) -> None:
            super().__init__()
            self.phase = nn.Parameter(torch.ones(4, dtype=torch.complex64))

    with pytest.raises(ValueError, match="cannot compare complex numbers, and 'phase' holds them"):
        run(Complex(), build())


def test_an_infinite_bound_is_neutral_also_to_an_infinite_gradient():
    class Infinite(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            pl_module.head.weight.grad.fill_(torch.inf)

    plain, neutral = small(), small()
    run(plain, Infinite(), max_steps=1)
    run(neutral, Infinite(), NormClipping(float("inf")), max_steps=1)
    assert torch.equal(plain.body.weight, neutral.body.weight)


# Learning rates.


class OwnRate(Small):
    """Sets the rate itself in every training step, as a hand-made schedule does."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.optimizers().param_groups[0]["lr"] = 0.01 * (1 + self.global_step)
        return super().training_step(batch, batch_idx)


def rates_of(module: Small, *callbacks: Any, **arguments: Any) -> list[float]:
    used: list[float] = []

    class Look(pl.Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            # Registered before the callback's own post hook, which puts the rate back.
            trainer.optimizers[0].register_step_post_hook(lambda o, *_: used.append(o.param_groups[0]["lr"]))

    run(module, Look(), *callbacks, **arguments)
    return used


def test_a_rate_that_the_step_sets_is_held_down_too_and_kept():
    pl.seed_everything(1, verbose=False)
    used = rates_of(OwnRate(), MomentumReset(every_n_steps=4, warmup_steps=2))
    steps = [0.01 * (1 + step) for step in range(12)]
    expected = [rate * {0: 0.01, 1: 0.2575}.get((i + 1) % 4, 1.0) if i >= 3 else rate for i, rate in enumerate(steps)]
    assert used == pytest.approx(expected, rel=1e-3)


def test_a_step_that_raises_and_is_caught_leaves_no_rate_behind():
    class Catches(Small):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()

            def closure() -> Tensor:
                if self.global_step == 3 and not self.caught:
                    raise MemoryError("out of memory, on purpose")
                optimizer.zero_grad()
                loss = Small.training_step(self, batch, batch_idx)
                self.manual_backward(loss)
                return loss

            try:
                optimizer.step(closure)
            except MemoryError:
                self.caught = True

        caught = False

    module = Catches()
    used = rates_of(module, MomentumReset(every_n_steps=4, warmup_steps=2))
    assert module.caught
    assert used[-1] == 0.01


@pytest.mark.filterwarnings("ignore:You defined multiple optimizers")
def test_an_optimizer_without_moments_is_passed_over_beside_one_that_has_them(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr("lightning_grad.core.callback.rank_zero_info", said.append)
    module = make_classifier(manual=True)
    body = [*module.mix.parameters(), *module.encoder.parameters()]
    rest = [*module.hidden.parameters(), *module.norm.parameters(), *module.head.parameters()]
    module.configure_optimizers = lambda: [torch.optim.AdamW(body, 1e-2), torch.optim.SGD(rest, 1e-2)]
    reset = MomentumReset(every_n_steps=3, warmup_steps=1)
    fit([reset], module, max_epochs=1)
    assert reset.state_dict()["steps"] == {"0": 6}
    assert "SGD" in said[0]


# What the monitor sees.


class UserClip(pl.Callback):
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        nn.utils.clip_grad_norm_(pl_module.parameters(), 1e-3)


@pytest.mark.parametrize("first", [True, False])
def test_a_callback_of_the_user_is_seen_from_both_sides(first):
    callbacks = [UserClip(), GradientMonitor()] if first else [GradientMonitor(), UserClip()]
    metrics = run(small(), *callbacks).callback_metrics
    assert metrics["grad/norm"] > 1e-2
    assert metrics["grad/norm_after"].item() == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize(("bound", "share"), [(1e9, 0.0), (1e-9, 1.0)])
def test_what_centers_is_no_clipping(bound, share):
    metrics = run(small(), GradientCentralization(), NormClipping(bound), GradientMonitor()).callback_metrics
    assert metrics["grad/clipped_share"] == share


def test_the_noise_scale_begins_when_accumulation_does():
    trainer = run(small(), GradientAccumulationScheduler({0: 1, 1: 3}), GradientMonitor())
    assert "grad/noise_scale" in trainer.callback_metrics


def test_a_parameter_without_entries_spoils_nothing():
    class Empty(Small):
        def __init__(self) -> None:
            super().__init__()
            self.none = nn.Parameter(torch.zeros(0))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + self.none.sum()

    metrics = run(Empty(), GradientMonitor()).callback_metrics
    assert torch.isfinite(metrics["grad/rms_min"])
    assert metrics["grad/below_epsilon"] == 0.0


class Experts(Small):
    """Uses another random set of layers at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0]
        for index in torch.randperm(6)[:3].tolist():
            x = self.experts[index](x)
        return x.square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_layers_that_come_and_go_are_all_in_the_record(tmp_path):
    monitor = GradientMonitor()
    run(Experts(), monitor, logger=CSVLogger(tmp_path))
    rows = monitor.state_dict()["records"]["0"]["layers"]["rows"]
    assert {name for row in rows for name in row["norms"]} == {"body", "head", *(f"experts.{i}" for i in range(6))}
    assert len(rows) == 12


def test_a_run_that_never_logs_keeps_no_more_than_it_must(monkeypatch):
    monkeypatch.setattr("lightning_grad.callbacks.diagnostics._optimizer_watch._MOST_ROWS", 5)
    waiting: list[int] = []

    class Look(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            waiting.append(len(monitor._watches[0]._rows))

    monitor = GradientMonitor()
    run(small(), monitor, Look(), log_every_n_steps=0)
    assert max(waiting) < 5


# Others.


def test_a_callback_of_somebody_else_may_have_a_phase():
    class Foreign(pl.Callback):
        role = "clip"

    run(small(), Foreign(), ZClip(), GradientMonitor(), max_epochs=1)


@pytest.mark.parametrize("technique", ALL, ids=str)
def test_a_technique_pickles_and_copies_in_mid_fit(technique):
    twins: list[Any] = []

    class Copy(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 5:
                twins.extend([pickle.loads(pickle.dumps(original)), copy.deepcopy(original)])

    original = technique.build()
    trainer, _ = fit([original, Copy()])
    assert trainer.current_epoch == 4
    for twin in twins:
        assert twin.settings == original.settings
        assert twin.state_dict().keys() == original.state_dict().keys()
        twin.teardown(trainer, trainer.lightning_module, "fit")


def test_another_window_takes_over_the_last_norms(tmp_path):
    first = AutoClip(window=4)
    run(small(), first, ModelCheckpoint(tmp_path))
    (path,) = tmp_path.glob("*.ckpt")
    for window in (2, 9):
        second = AutoClip(window=window)
        second._stage = "fit"
        second.load_state_dict(torch.load(path, weights_only=True)["callbacks"]["AutoClip"])
        state = second._memory[0].states[""]
        old = first._memory[0].states[""]
        in_order = old["norms"].roll(-(int(old["count"]) % 4))
        kept = min(window, 4)
        assert len(state["norms"]) == window
        assert int(state["count"]) == kept
        assert torch.equal(state["norms"][:kept], in_order[-kept:])


def test_data_of_another_kind_has_no_batch_size_to_read():
    class Named(Small):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step([batch["nested"][0]["x"]], batch_idx)

        def train_dataloader(self) -> Any:
            rows = [{"nested": [{"x": torch.randn(4)}], "name": "row"} for _ in range(8)]
            return DataLoader(rows, 4)

    trainer = run(Named(), GradientMonitor(), accumulate_grad_batches=2, max_epochs=1)
    assert "grad/noise_scale" in trainer.callback_metrics
