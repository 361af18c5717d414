"""Spike-aware clipping in a fit: against SPAM itself, late first gradients, pauses, and optimizers without a past."""

from typing import Any

import pytest
import torch

from lightning_grad.callbacks import MomentumReset, SpikeClipping
from tests.callbacks.clipping import Dictated, Gradients, rows_of, rows_with_norms, train

QUIET, SPIKE = 1.0, 1000.0


def adam(parameters: Any) -> torch.optim.Adam:
    return torch.optim.Adam(parameters, lr=1e-2)


def rows(steps: int, spikes: list[int]) -> torch.Tensor:
    """Return one row a step, a thousand times as large in the steps that are spikes."""
    return rows_with_norms([SPIKE if step in spikes else QUIET for step in range(steps)])


def clipped_steps(callbacks: list[Any], data: torch.Tensor) -> list[int]:
    """Return the steps in which a gradient was clipped."""
    after = Gradients()
    train([*callbacks, after], Dictated(make_optimizer=adam), rows_of(data))
    return [step for step, seen in enumerate(after.seen) if not torch.equal(seen["w"], data[step])]


def test_with_adam_and_momentum_reset_it_is_spam() -> None:
    """Against the class of pytorch_optimizer, but for its warm-up, which is a step ahead of the released code."""
    spam = pytest.importorskip("pytorch_optimizer").SPAM
    # Spikes in every part: before the first reset, in the pause after it, beyond it, and in the second one.
    data = rows(120, spikes=[30, 45, 55, 75, 90, 103, 119])
    expected, found, plain = (
        Dictated(make_optimizer=lambda p: spam(p, lr=1e-2, eps=1e-12, warmup_epoch=0, update_proj_gap=50)),
        Dictated(make_optimizer=lambda p: torch.optim.Adam(p, lr=1e-2, eps=1e-12)),
        Dictated(make_optimizer=lambda p: torch.optim.Adam(p, lr=1e-2, eps=1e-12)),
    )
    train([], expected, rows_of(data))
    train([MomentumReset(every_n_steps=50, warmup_steps=0), SpikeClipping()], found, rows_of(data))
    train([], plain, rows_of(data))
    torch.testing.assert_close(found.w, expected.w, rtol=1e-5, atol=1e-6)
    assert (plain.w - expected.w).abs().max() > 1e-2, "all this makes a difference"


def test_spikes_are_clipped_to_their_past() -> None:
    data, after, before = torch.ones(8, 4), Gradients(), []
    data[5] = torch.tensor([SPIKE, -SPIKE, 1.0, 2.0])

    class Moments(Gradients):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            state = optimizer.state.get(pl_module.w, {})
            before.append(state["exp_avg_sq"].clone() if state else None)

    train([Moments(), SpikeClipping(pause=0), after], Dictated(make_optimizer=adam), rows_of(data))
    limit = (5000.0 * before[5]).sqrt()
    torch.testing.assert_close(after.seen[5]["w"], torch.stack([limit[0], -limit[1], data[5, 2], data[5, 3]]))
    assert all(torch.equal(after.seen[step]["w"], data[step]) for step in (0, 1, 2, 3, 4, 6, 7))


@pytest.mark.parametrize("pause", [0, 1, 5])
def test_it_pauses_at_the_start(pause: int) -> None:
    # The second step is the first that has a past.
    data = rows(12, spikes=[])
    assert clipped_steps([SpikeClipping(1e-6, pause)], data) == list(range(max(pause, 1), 12))


def test_it_pauses_after_each_reset_of_the_moments() -> None:
    data = rows(24, spikes=[])
    # The moments are reset in the tenth and the twentieth step; those two and the next two are left alone.
    found = clipped_steps([MomentumReset(every_n_steps=10, warmup_steps=0), SpikeClipping(1e-6, pause=3)], data)
    assert found == [*range(3, 9), *range(12, 19), *range(22, 24)]


def test_a_parameter_whose_first_gradient_comes_late_trains() -> None:
    """In SPAM as released its gradient is set to zero, and as that leaves its past at zero, it never trains."""

    class Late(Dictated):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = super().training_step(batch, batch_idx)
            late = self.late.sum() if batch_idx >= 10 else self.late[:1].sum() * 0.0
            return loss + late + (self.unused.sum() if batch_idx >= 10 else 0.0)

        def configure_optimizers(self) -> Any:
            return adam(self.parameters())

    module = Late()
    # One has gradients of zero at first, the other none at all.
    module.late, module.unused = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    after = Gradients()
    train([SpikeClipping(pause=2), after], module, rows_of(rows(16, spikes=[])))
    assert "unused" not in after.seen[9]
    for step in range(10, 16):
        assert torch.equal(after.seen[step]["late"], torch.ones(3)), step
        assert torch.equal(after.seen[step]["unused"], torch.ones(3)), step
    assert (module.late < 0.0).all()
    assert (module.unused < 0.0).all()


@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), lambda p: torch.optim.RMSprop(p, lr=0.1)]
)
def test_optimizers_without_a_second_moment_are_refused_by_name(make: Any) -> None:
    module = Dictated(make_optimizer=make)
    name = type(make([torch.nn.Parameter(torch.zeros(1))])).__name__
    with pytest.raises(
        ValueError, match=rf"SpikeClipping reads the second moment \(exp_avg_sq\).*and {name} keeps none"
    ):
        train([SpikeClipping()], module, rows_of(rows(2, [])))


def test_an_optimizer_that_it_does_not_touch_may_be_any() -> None:
    class Two(Dictated):
        def __init__(self) -> None:
            super().__init__(("a", "b"))
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [adam([self.a]), torch.optim.SGD([self.b], lr=0.1)]

    data = rows_of(torch.ones(3, 8))
    trainer = train([SpikeClipping(include=["a"])], Two(), data)
    assert trainer.global_step == 6
    with pytest.raises(ValueError, match="SGD keeps none"):
        train([SpikeClipping()], Two(), data)


def test_each_pattern_has_its_threshold() -> None:
    data = torch.cat([rows(4, []), torch.full((1, 4), SPIKE)]).repeat(1, 2)
    after = Gradients()
    callback = SpikeClipping({"a": 1.0}, pause=2)
    train([callback, after], Dictated(("a", "b"), make_optimizer=adam), rows_of(data))
    assert after.seen[4]["a"].max() < 1.0
    assert torch.equal(after.seen[4]["b"], data[4, :4])


def test_what_is_logged() -> None:
    data = torch.ones(6, 4)
    data[5, 0] = SPIKE
    trainer = train([SpikeClipping(pause=2)], Dictated(make_optimizer=adam), rows_of(data), log_every_n_steps=1)
    assert {key: value.item() for key, value in trainer.callback_metrics.items()} == {
        "grad/spike_clipping/clipped_entries": 0.25
    }
