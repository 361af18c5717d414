"""Momentum reset in a fit: when the moments are zero, what rate a step sees, and what a scheduler reads."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiplicativeLR

from lightning_grad.callbacks import MomentumReset, SkipNonFinite
from lightning_grad.functional import reset_warmup
from tests.callbacks.clipping import Dictated, rows_of, train

RATE = 1e-2
DATA = torch.randn(24, 4, generator=torch.Generator().manual_seed(2)) + 2.0
SCHEDULES = {
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, 24),
    "multiplicative": lambda optimizer: MultiplicativeLR(optimizer, lambda _: 0.9),
}


def adam(parameters: Any) -> torch.optim.Adam:
    return torch.optim.Adam(parameters, lr=RATE)


class Inside(pl.Callback):
    """Looks inside ``optimizer.step``: what moments and what rate the step is made with; and at the rate outside it."""

    def __init__(self) -> None:
        self.moments: list[float] = []
        self.rates: list[float] = []
        self.outside: list[float] = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        (self.optimizer,) = trainer.optimizers
        self.optimizer.register_step_pre_hook(self._look)

    def _look(self, optimizer: Any, *_: Any) -> None:
        state = optimizer.state.get(optimizer.param_groups[0]["params"][0], {})
        self.moments.append(sum(state[key].abs().sum().item() for key in ("exp_avg", "exp_avg_sq") if key in state))
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, *_: Any) -> None:
        self.outside.append(self.optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("every", [1, 4, 10])
def test_moments_are_zero_at_every_so_many_steps_and_at_no_other(every: int) -> None:
    inside = Inside()
    train([MomentumReset(every, warmup_steps=0), inside], Dictated(make_optimizer=adam), rows_of(DATA))
    zero = [step for step, moments in enumerate(inside.moments, 1) if moments == 0.0]
    assert zero == sorted({1, *range(every, 25, every)})
    assert inside.rates == [RATE] * 24


def test_each_step_sees_the_rate_of_its_warmup() -> None:
    inside = Inside()
    train([MomentumReset(every_n_steps=10, warmup_steps=4), inside], Dictated(make_optimizer=adam), rows_of(DATA))
    ramp = [reset_warmup(k, 4) for k in range(4)]
    factors = [1.0] * 9 + ramp + [1.0] * 6 + ramp + [1.0]
    assert inside.rates == pytest.approx([RATE * factor for factor in factors])
    assert inside.outside == [RATE] * 24


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_recursive_schedule_is_what_it_would_be(schedule: str) -> None:
    """Both compute each rate from the one before, so a rate that is not put back in time is lost for good."""
    without, beside = Inside(), Inside()
    train([without], Dictated(("w",), adam, SCHEDULES[schedule]), rows_of(DATA))
    callback = MomentumReset(every_n_steps=6, warmup_steps=4)
    train([callback, beside], Dictated(("w",), adam, SCHEDULES[schedule]), rows_of(DATA))
    assert beside.outside == without.outside
    assert min(a / b for a, b in zip(beside.rates, without.rates, strict=True)) == pytest.approx(0.01)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_overflow_in_the_warmup_takes_no_step_of_it(schedule: str) -> None:
    data = DATA.clone()
    data[11] = torch.inf  # the twelfth batch; the reset is in the tenth step

    def run(callbacks: list[Any]) -> Inside:
        inside, scaler = Inside(), torch.amp.GradScaler("cpu", init_scale=16.0)
        plugins = [MixedPrecision("16-mixed", "cpu", scaler)]
        train([*callbacks, inside], Dictated(("w",), adam, SCHEDULES[schedule]), rows_of(data), plugins=plugins)
        assert scaler.get_scale() == 8.0, "there was one overflow"
        return inside

    callback = MomentumReset(every_n_steps=10, warmup_steps=5)
    without, beside = run([]), run([callback])
    assert beside.outside == without.outside
    ramp = [reset_warmup(k, 5) for k in range(5)]
    # 23 steps are made, and the warm-up is whole: the skipped one is not counted.
    factors = [1.0] * 9 + ramp + [1.0] * 5 + ramp[:4]
    assert [a / b for a, b in zip(beside.rates, without.rates, strict=True)] == pytest.approx(factors)
    assert callback.state_dict()["steps"] == {"0": 23}


def test_a_step_that_was_skipped_for_nan_is_not_counted() -> None:
    data = DATA.clone()
    data[3] = torch.nan
    callback, inside = MomentumReset(every_n_steps=6, warmup_steps=0), Inside()
    train([callback, SkipNonFinite(max_warnings=0), inside], Dictated(make_optimizer=adam), rows_of(data))
    assert callback.state_dict()["steps"] == {"0": 23}
    zero = [step for step, moments in enumerate(inside.moments) if moments == 0.0]
    # The sixth step that is made is that of the seventh batch.
    assert zero == [0, 6, 12, 18]


def test_an_exception_in_mid_warmup_leaves_the_rate_as_it_was() -> None:
    class Stops(Dictated):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if batch_idx == 10:  # inside optimizer.step, where the rate is held down
                assert self.trainer.optimizers[0].param_groups[0]["lr"] < RATE
                raise RuntimeError("stopped on purpose")
            return super().training_step(batch, batch_idx)

    module, inside = Stops(make_optimizer=adam), Inside()
    with pytest.raises(RuntimeError, match="on purpose"):
        train([MomentumReset(every_n_steps=10, warmup_steps=5), inside], module, rows_of(DATA))
    assert inside.optimizer.param_groups[0]["lr"] == RATE


def test_every_param_group_keeps_its_own_rate() -> None:
    def two_groups(parameters: Any) -> torch.optim.Adam:
        first, second = parameters
        return torch.optim.Adam([{"params": [first]}, {"params": [second], "lr": 0.5}], lr=RATE)

    seen: list[list[float]] = []

    class Rates(Inside):
        def _look(self, optimizer: Any, *_: Any) -> None:
            seen.append([group["lr"] for group in optimizer.param_groups])

    inside = Rates()
    train(
        [MomentumReset(every_n_steps=2, warmup_steps=1), inside],
        Dictated(("a", "b"), two_groups),
        rows_of(DATA[:4].repeat(1, 2)),
    )
    assert seen[2] == [RATE, 0.5]
    assert seen[1] == seen[3] == pytest.approx([0.01 * RATE, 0.01 * 0.5])
    assert [group["lr"] for group in inside.optimizer.param_groups] == [RATE, 0.5]


def test_a_second_instance_is_refused() -> None:
    callbacks = [MomentumReset(), MomentumReset(name="b")]
    with pytest.raises(ValueError, match=r"Use only one MomentumReset per Trainer"):
        train(callbacks, Dictated(make_optimizer=adam), rows_of(DATA))


@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), lambda p: torch.optim.RMSprop(p, lr=0.1)]
)
def test_optimizers_without_moments_are_refused_by_name(make: Any) -> None:
    name = type(make([torch.nn.Parameter(torch.zeros(1))])).__name__
    with pytest.raises(ValueError, match=rf"MomentumReset sets the moments .* to zero, and {name} keeps none"):
        train([MomentumReset()], Dictated(make_optimizer=make), rows_of(DATA))


@pytest.mark.parametrize("fused", [False, True])
def test_fused_optimizer_beside_a_grad_scaler(fused: bool) -> None:
    """A fused optimizer decides inside its step whether the step is skipped, so its hooks tell nothing."""
    scaling = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=16.0))
    module = Dictated(make_optimizer=lambda p: torch.optim.Adam(p, lr=RATE, fused=fused))
    if fused:
        with pytest.raises(ValueError, match="fused Adam"):
            train([MomentumReset()], module, rows_of(DATA), plugins=[scaling])
    else:
        train([MomentumReset()], module, rows_of(DATA), plugins=[scaling])


def test_steps_past_lightning_are_seen() -> None:
    class Manual(Dictated):
        def __init__(self) -> None:
            super().__init__(make_optimizer=adam)
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers().optimizer
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    inside = Inside()
    train([MomentumReset(every_n_steps=10, warmup_steps=0), inside], Manual(), rows_of(DATA))
    assert [step for step, moments in enumerate(inside.moments, 1) if moments == 0.0] == [1, 10, 20]


def test_what_is_logged() -> None:
    callback = MomentumReset(every_n_steps=4, warmup_steps=3)
    trainer = train([callback], Dictated(make_optimizer=adam), rows_of(DATA[:9]), log_every_n_steps=1)
    found = {key: value.item() for key, value in trainer.callback_metrics.items()}
    # The ninth step is the second of the second warm-up.
    assert found == {
        "grad/momentum_reset/lr_factor": pytest.approx(reset_warmup(1, 3)),
        "grad/momentum_reset/resets": 2.0,
    }


@pytest.mark.parametrize(("every", "warmup"), [(1, 0), (2, 1), (100, 50), (299, 149), (500, 150), (10**6, 150)])
def test_the_warmup_is_half_of_every_at_most_unless_it_is_given(every: int, warmup: int) -> None:
    assert MomentumReset(every).settings == {"every_n_steps": every, "warmup_steps": warmup, "name": None}
    assert MomentumReset(every, warmup_steps=0).warmup_steps == 0


def test_it_says_what_it_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("lightning_grad.core.callback.rank_zero_info", said.append)
    train([MomentumReset(6, 2)], Dictated(make_optimizer=adam), rows_of(DATA[:3]))
    train([MomentumReset(6, 0)], Dictated(make_optimizer=adam), rows_of(DATA[:3]))
    start = "MomentumReset resets the moments of Adam every 6 steps"
    assert said == [f"{start}, and reduces the learning rate for 2 steps after each reset.", f"{start}."]
