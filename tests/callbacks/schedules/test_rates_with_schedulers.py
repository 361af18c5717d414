"""A cut holds under every scheduler of torch: the rates of each step are those without the callback, times the scale."""

import math
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.optim import SGD, Adam
from torch.optim import lr_scheduler as lrs

from lightning_grad.callbacks.schedules.accuracy_gradient_lr import AccuracyGradientLR, _mute_schedulers
from lightning_grad.functional.schedules.accuracy_gradient_lr import accuracy_gradient_scales
from lightning_grad.functional.torch_version import TORCH
from lightning_grad.testing import assert_identical
from tests.callbacks.schedules.dictated import BATCHES, QUICK, Dictated, Rates, train

pytestmark = [
    pytest.mark.filterwarnings("ignore:A `(OneCycleLR|CyclicLR)` scheduler is using"),
    pytest.mark.filterwarnings(
        "ignore:The epoch parameter in `scheduler.step"
    ),  # of SequentialLR itself before torch 2.9
]

EPOCHS = 10
STEPS = EPOCHS * BATCHES

# Each as made for a number of steps, which are batches or epochs.
SCHEDULERS: dict[str, Any] = {
    "StepLR": lambda o, n: lrs.StepLR(o, max(n // 4, 1), 0.5),
    "MultiStepLR": lambda o, n: lrs.MultiStepLR(o, [n // 3, n // 2], 0.3),
    "ConstantLR": lambda o, n: lrs.ConstantLR(o, 0.5, n // 2),
    "MultiplicativeLR": lambda o, n: lrs.MultiplicativeLR(o, lambda t: 0.95),
    "ExponentialLR": lambda o, n: lrs.ExponentialLR(o, 0.9),
    "CosineAnnealingLR": lambda o, n: lrs.CosineAnnealingLR(o, n),
    "CosineAnnealingLR-up-again": lambda o, n: lrs.CosineAnnealingLR(o, n // 3),
    "LambdaLR": lambda o, n: lrs.LambdaLR(o, lambda t: 1.0 / (1.0 + t)),
    "OneCycleLR": lambda o, n: lrs.OneCycleLR(o, [0.4] * len(o.param_groups), total_steps=n + 1),
    "OneCycleLR-three-phase": lambda o, n: lrs.OneCycleLR(o, 0.4, total_steps=n + 1, three_phase=True),
    "LinearLR": lambda o, n: lrs.LinearLR(o, 0.1, 1.0, total_iters=n // 2),
    "PolynomialLR": lambda o, n: lrs.PolynomialLR(o, n, 2.0),
    "CyclicLR": lambda o, n: lrs.CyclicLR(o, 0.01, 0.3, max(n // 4, 1)),
    "CyclicLR-triangular2": lambda o, n: lrs.CyclicLR(o, 0.01, 0.3, max(n // 5, 1), mode="triangular2"),
    "CosineAnnealingWarmRestarts": lambda o, n: lrs.CosineAnnealingWarmRestarts(o, max(n // 4, 1)),
    "SequentialLR": lambda o, n: lrs.SequentialLR(
        o, [lrs.LinearLR(o, 0.1, total_iters=n // 2), lrs.CosineAnnealingLR(o, n)], [n // 2]
    ),
    "SequentialLR-of-lambdas": lambda o, n: lrs.SequentialLR(
        o, [lrs.LambdaLR(o, lambda t: 0.5), lrs.LambdaLR(o, lambda t: 0.9**t)], [n // 2]
    ),
    "ChainedScheduler-of-a-SequentialLR": lambda o, n: lrs.ChainedScheduler(
        [
            lrs.SequentialLR(o, [lrs.ConstantLR(o, 0.5, n // 4), lrs.LambdaLR(o, lambda t: 0.9**t)], [n // 2]),
            lrs.StepLR(o, 3, 0.9),
        ]
    ),
    "ChainedScheduler": lambda o, n: lrs.ChainedScheduler(
        [lrs.LinearLR(o, 0.1, total_iters=n // 2), lrs.ExponentialLR(o, 0.95)]
    ),
    "SWALR": lambda o, n: torch.optim.swa_utils.SWALR(o, 0.02, n // 2),
    "none": None,
}


def configuration(
    make: Any, interval: str = "step", rates: tuple[Any, ...] = (0.1, 0.05), optimizer: type = SGD
) -> Any:
    """Return what configures an optimizer of two groups and a scheduler made for the run."""

    def configure(parameters: list[Any]) -> Any:
        groups = [{"params": [p], "lr": rate} for p, rate in zip(parameters, rates, strict=True)]
        made = optimizer(groups, momentum=0.5) if optimizer is SGD else optimizer(groups)
        if make is None:
            return made
        scheduler = make(made, STEPS if interval == "step" else EPOCHS)
        return {"optimizer": made, "lr_scheduler": {"scheduler": scheduler, "interval": interval}}

    return configure


def run(make: Any, interval: str = "step", callback: Any = None, **rest: Any) -> tuple[Any, list[list[float]]]:
    module = Dictated(configure=configuration(make, interval, **rest))
    trainer, rates = train([] if callback is None else [callback], module, max_epochs=EPOCHS)
    return trainer, rates.seen


def scales_of_steps(**settings: Any) -> list[float]:
    """Return the scale in each step of a run with constant accuracy: that after the validation before it."""
    after = [1.0, *accuracy_gradient_scales([0.5] * EPOCHS, **{**QUICK, **settings})]
    return [after[step // BATCHES] for step in range(STEPS)]


@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_cut_holds(name: str, interval: str) -> None:
    _, plain = run(SCHEDULERS[name], interval)
    _, cut = run(SCHEDULERS[name], interval, AccuracyGradientLR(**QUICK))
    scales = scales_of_steps()
    assert scales[::BATCHES] == [1.0] * 4 + [0.5] * 2 + [0.25] * 2 + [0.125] * 2
    for step, (expected, seen, scale) in enumerate(zip(plain, cut, scales, strict=True)):
        assert seen == pytest.approx([rate * scale for rate in expected], rel=1e-9, abs=1e-15), step


@pytest.mark.parametrize("name", SCHEDULERS)
def test_groups_that_are_not_chosen_keep_every_bit(name: str) -> None:
    _, plain = run(SCHEDULERS[name])
    _, cut = run(SCHEDULERS[name], callback=AccuracyGradientLR(param_groups=[1], **QUICK))
    assert [rates[0] for rates in cut] == [rates[0] for rates in plain]
    expected = [rates[1] * scale for rates, scale in zip(plain, scales_of_steps(), strict=True)]
    assert [rates[1] for rates in cut] == pytest.approx(expected, rel=1e-9, abs=1e-15)


def holds(trainer: Any, rates: tuple[Any, ...]) -> bool:
    """Return whether the groups of the optimizer have these very tensors as their rates."""
    groups = trainer.optimizers[0].param_groups
    return all(group["lr"] is rate for group, rate in zip(groups, rates, strict=True))


@pytest.mark.parametrize("name", ["none", "ExponentialLR", "LambdaLR", "CosineAnnealingWarmRestarts", "SequentialLR"])
def test_a_cut_holds_where_rates_are_tensors(name: str) -> None:
    kinds = {"rates": (torch.tensor(0.1), torch.tensor(0.05)), "optimizer": Adam}
    alone, plain = run(SCHEDULERS[name], **kinds)
    kept = holds(alone, kinds["rates"])
    kinds = {"rates": (torch.tensor(0.1), torch.tensor(0.05)), "optimizer": Adam}
    trainer, cut = run(SCHEDULERS[name], callback=AccuracyGradientLR(**QUICK), **kinds)
    for expected, seen, scale in zip(plain, cut, scales_of_steps(), strict=True):
        assert seen == pytest.approx([rate * scale for rate in expected], rel=1e-5, abs=1e-9)
    assert holds(trainer, kinds["rates"]) == kept
    assert kept or TORCH < (2, 10), "schedulers put other tensors in their place before torch 2.10"


def plateau(monitor: str) -> Any:
    def configure(parameters: list[Any]) -> Any:
        optimizer = SGD(parameters, lr=0.1)
        scheduler = lrs.ReduceLROnPlateau(optimizer, "max", factor=0.3, patience=1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": monitor}}

    return configure


class TwoMetrics(Dictated):
    """Its other metric rises at first."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("other", min(self.current_epoch, 3.0))


def test_a_cut_holds_with_reduce_on_plateau() -> None:
    _, plain = train([], TwoMetrics(configure=plateau("other")))
    _, cut = train([AccuracyGradientLR(**QUICK)], TwoMetrics(configure=plateau("other")))
    assert len(set(plain.first())) == 3
    expected = [rate * scale for rate, scale in zip(plain.first(), scales_of_steps(), strict=True)]
    assert cut.first() == pytest.approx(expected)


def test_two_that_cut_by_one_metric_are_warned_of() -> None:
    with pytest.warns(
        UserWarning, match="AccuracyGradientLR and ReduceLROnPlateau both cut the learning rate by 'val_acc'"
    ):
        train([AccuracyGradientLR(**QUICK)], Dictated(configure=plateau("val_acc")), max_epochs=1)
    _, rates = train([AccuracyGradientLR(**QUICK, policy="replace")], Dictated(configure=plateau("val_acc")))
    assert rates.first() == [0.1 * scale for scale in scales_of_steps()]


def test_a_floor_of_the_schedule_itself_stays() -> None:
    make = lambda o, n: lrs.CosineAnnealingLR(o, n, eta_min=0.02)  # noqa: E731
    _, plain = run(make)
    _, cut = run(make, callback=AccuracyGradientLR(**QUICK))
    ratios = [seen[0] / expected[0] for seen, expected in zip(cut, plain, strict=True)]
    assert ratios[: 4 * BATCHES + 1] == [1.0] * 4 * BATCHES + [pytest.approx(0.5)]
    assert all(0.02 * scale < seen[0] for seen, scale in zip(cut, scales_of_steps(), strict=True))
    assert cut[-1][0] > 2 * 0.125 * plain[-1][0], "it drifts from the scaled rate"
    assert abs(cut[-1][0] - 0.02) < abs(0.125 * plain[-1][0] - 0.02), "towards eta_min"


# Replacing the schedule.


@pytest.mark.parametrize(
    ("name", "interval"), [*((name, "step") for name in SCHEDULERS), ("StepLR", "epoch"), ("SequentialLR", "epoch")]
)
def test_replace_lets_no_scheduler_act(name: str, interval: str) -> None:
    _, seen = run(SCHEDULERS[name], interval, AccuracyGradientLR(policy="replace", **QUICK))
    start = {"OneCycleLR": 0.016, "OneCycleLR-three-phase": 0.016, "CyclicLR": 0.01, "CyclicLR-triangular2": 0.01}
    first, second = (start.get(name, rate) for rate in (0.1, 0.05))
    expected = [[first * scale, second * scale] for scale in scales_of_steps()]
    assert seen == [pytest.approx(rates, rel=1e-12) for rates in expected]


def test_replace_leaves_groups_that_are_not_chosen_at_their_initial_rate() -> None:
    _, seen = run(SCHEDULERS["LinearLR"], callback=AccuracyGradientLR(policy="replace", param_groups=[1], **QUICK))
    assert seen == [[0.1, 0.05 * scale] for scale in scales_of_steps()]


def test_replace_keeps_schedulers_of_other_optimizers() -> None:
    """Lightning has but one optimizer where it steps schedulers itself, so this is asked of the wrapper."""
    module = Stepping()
    one, other = SGD([module.weights[0]], 0.1), SGD([module.weights[1]], 0.1)
    schedulers = [lrs.StepLR(one, 1), lrs.StepLR(other, 1)]
    end = _mute_schedulers(module, [one], "X")
    for scheduler in schedulers:
        module.lr_scheduler_step(scheduler, None)
    assert module.stepped == [schedulers[1]]
    end()
    assert "lr_scheduler_step" not in module.__dict__


class Stepping(Dictated):
    """Writes down which schedulers are stepped."""

    def __init__(self) -> None:
        super().__init__()
        self.stepped: list[Any] = []

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        self.stepped.append(scheduler)


# Several optimizers, and manual optimization.


class Manual(Dictated):
    """Steps two optimizers, and their schedulers, itself."""

    def __init__(self, schedules: bool = True) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.schedules = schedules

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()
        for scheduler in self.lr_schedulers() if self.schedules else ():
            scheduler.step()

    def configure_optimizers(self) -> Any:
        optimizers = [SGD([self.weights[0]], lr=0.1), Adam([self.weights[1]], lr=0.01)]
        if not self.schedules:
            return optimizers
        return optimizers, [lrs.LambdaLR(optimizers[0], lambda t: 0.9**t), lrs.ExponentialLR(optimizers[1], 0.95)]


@pytest.mark.parametrize("chosen", [None, [0], [1], [1, 0]])
def test_optimizers_of_manual_optimization(chosen: Any) -> None:
    _, plain = train([], Manual())
    _, cut = train([AccuracyGradientLR(optimizers=chosen, **QUICK)], Manual())
    for number in range(2):
        is_cut = chosen is None or number in chosen
        expected = [
            rates[number] * (scale if is_cut else 1.0)
            for rates, scale in zip(plain.seen, scales_of_steps(), strict=True)
        ]
        assert [rates[number] for rates in cut.seen] == pytest.approx(expected, rel=1e-9)


def test_replace_refuses_schedulers_that_the_module_steps() -> None:
    with pytest.raises(
        ValueError, match=r"under manual optimization the module steps them itself. Use policy='multiply'"
    ):
        train([AccuracyGradientLR(policy="replace")], Manual())
    _, rates = train([AccuracyGradientLR(policy="replace", **QUICK)], Manual(schedules=False))
    assert rates.seen == [[0.1 * scale, 0.01 * scale] for scale in scales_of_steps()]


# Floors.


def test_the_floor_is_that_of_the_first_group_and_others_keep_their_ratio() -> None:
    _, seen = run(None, callback=AccuracyGradientLR(min_lr=0.02, **QUICK), rates=(0.1, 0.004))
    floors = scales_of_steps(floor=0.2)
    assert set(floors) == {1.0, 0.5, 0.25, 0.2}
    assert seen == [pytest.approx([0.1 * scale, 0.004 * scale]) for scale in floors]


@pytest.mark.parametrize("min_lr", [0.1, 0.3])
def test_the_floor_never_raises_a_rate(min_lr: float) -> None:
    _, seen = run(None, callback=AccuracyGradientLR(min_lr=min_lr, **QUICK))
    assert seen == [[0.1, 0.05]] * STEPS


def test_the_floor_is_relative_to_the_highest_rate_of_a_cycle() -> None:
    _, plain = run(SCHEDULERS["OneCycleLR"])
    _, cut = run(SCHEDULERS["OneCycleLR"], callback=AccuracyGradientLR(min_lr=0.16, **QUICK))
    scales = scales_of_steps(floor=0.4)
    assert set(scales) == {1.0, 0.5, 0.4}
    assert [rates[0] for rates in cut] == pytest.approx([r[0] * s for r, s in zip(plain, scales, strict=True)])


def test_the_floor_of_a_rate_that_replaces_a_schedule_is_relative_to_that_rate() -> None:
    _, seen = run(SCHEDULERS["OneCycleLR"], callback=AccuracyGradientLR(min_lr=0.0064, policy="replace", **QUICK))
    assert [rates[0] for rates in seen] == pytest.approx([0.016 * scale for scale in scales_of_steps(floor=0.4)])


# What others see.


class Foreign:
    """A scheduler that is not torch's, and sets rates from a base of its own."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.steps = 0

    def step(self) -> None:
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] = 0.1 / (1 + self.steps)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None: ...


def test_a_foreign_scheduler_is_warned_of_by_name() -> None:
    class Module(Dictated):
        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            scheduler.step()

    make = lambda o, n: Foreign(o)  # noqa: E731
    with pytest.warns(UserWarning, match="Foreign is not a scheduler of torch, and may undo the cuts"):
        train([AccuracyGradientLR(**QUICK)], Module(configure=configuration(make)))
    _, rates = train([AccuracyGradientLR(policy="replace", **QUICK)], Module(configure=configuration(make)))
    assert rates.first() == [0.1 * scale for scale in scales_of_steps()]


def test_learning_rate_monitor_sees_the_cut_rates(tmp_path: Any) -> None:
    monitor = LearningRateMonitor("epoch")
    module = Dictated(configure=configuration(SCHEDULERS["StepLR"]))
    _, rates = train([AccuracyGradientLR(**QUICK), monitor], module, logger=CSVLogger(tmp_path))
    lines = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("lr-SGD/pg1")
    logged = [float(line.split(",")[column]) for line in lines[1:] if line.split(",")[column]]
    assert logged == rates.epochs()
    assert min(logged) < 0.1 * 0.125


# Not ReduceLROnPlateau: Lightning writes checkpoints before it steps, and does not step it again.
@pytest.mark.parametrize(
    ("name", "policy"),
    [*((name, "multiply") for name in SCHEDULERS), ("OneCycleLR", "replace"), ("LinearLR", "replace")],
)
def test_resuming_is_bit_exact(name: str, policy: str, tmp_path: Any) -> None:
    if name == "SWALR" and TORCH < (2, 10):
        pytest.skip("before torch 2.10 the state of SWALR holds a method, and loads with weights_only=False only")

    def callbacks() -> list[Any]:
        saving = ModelCheckpoint(tmp_path, save_top_k=-1, monitor="lr/scale", filename="{epoch}")
        return [AccuracyGradientLR(policy=policy, min_lr=0.02, **QUICK), saving]

    def module() -> Dictated:
        return Dictated(configure=configuration(SCHEDULERS[name]))

    whole = callbacks()
    trainer, rates = train(whole, module())
    for epoch in (4, 9):
        rest = callbacks()
        resumed, seen = train(rest, module(), ckpt=tmp_path / f"epoch={epoch}.ckpt")
        assert seen.seen == rates.seen[len(rates.seen) - len(seen.seen) :]
        assert len(seen.seen) == (9 - epoch) * BATCHES
        assert_identical(whole[0].state_dict(), rest[0].state_dict())
        assert_identical(trainer.optimizers[0].state_dict(), resumed.optimizers[0].state_dict())
        for one, other in zip(trainer.lr_scheduler_configs, resumed.lr_scheduler_configs, strict=True):
            states = [_plain(config.scheduler.state_dict()) for config in (one, other)]
            assert_identical(*states)


def _plain(state: Any) -> Any:
    """Return what of a scheduler's state can be compared: no functions."""
    if isinstance(state, dict):
        return {key: _plain(value) for key, value in state.items() if not callable(value)}
    if isinstance(state, list):
        return [_plain(value) for value in state if value is None or not callable(value)]
    return state


def test_a_checkpoint_goes_on_without_the_callback(tmp_path: Any) -> None:
    saving = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}", monitor="lr/scale")
    configure = configuration(SCHEDULERS["LambdaLR"])
    _, plain = train([], Dictated(configure=configure))
    train([AccuracyGradientLR(**QUICK), saving], Dictated(configure=configure))
    with pytest.warns(UserWarning, match="AccuracyGradientLR"):
        _, rest = train([], Dictated(configure=configure), ckpt=tmp_path / "epoch=6.ckpt")
    assert rest.first() == pytest.approx([0.25 * rate for rate in plain.first()[7 * BATCHES :]], rel=1e-9)


def test_a_plain_checkpoint_goes_on_with_the_callback(tmp_path: Any) -> None:
    saving = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    configure = configuration(SCHEDULERS["ExponentialLR"])
    _, plain = train([saving], Dictated(configure=configure))
    callback = AccuracyGradientLR(min_lr=0.05, **QUICK)
    _, rest = train([callback, saving], Dictated(configure=configure), ckpt=tmp_path / "epoch=3.ckpt")
    assert rest.first()[::BATCHES] == pytest.approx(
        [rate * scale for rate, scale in zip(plain.epochs()[4:], [1.0] * 4 + [0.5] * 2, strict=True)]
    )
    assert math.isclose(callback.state_dict()["base"], 0.1)
    again = AccuracyGradientLR(policy="replace", **QUICK)
    _, replaced = train([again, saving], Dictated(configure=configure), ckpt=tmp_path / "epoch=3.ckpt")
    assert replaced.epochs() == [0.1] * 4 + [0.05] * 2


def test_rates_are_written_down_at_every_step() -> None:
    """The tests above would be blind if they were not."""
    _, rates = train([], Dictated(configure=configuration(SCHEDULERS["ExponentialLR"])))
    assert isinstance(rates, Rates)
    assert len(set(rates.first())) == STEPS
