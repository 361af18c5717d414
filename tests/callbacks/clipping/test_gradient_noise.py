"""Gradient noise in a fit: its deviation over the run, and what it depends on."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_grad.callbacks import GradientNoise
from lightning_grad.functional import noise_deviation
from lightning_grad.testing import assert_identical
from tests.callbacks.clipping import Dictated, Gradients, rows_of, train


def noise(*callbacks: GradientNoise, steps: int = 4, names: tuple[str, ...] = ("w",)) -> list[dict[str, Tensor]]:
    """Return the noise of each step: what is left of gradients that are zero."""
    after = Gradients()
    train([*callbacks, after], Dictated(names), rows_of(torch.zeros(steps, 4 * len(names))))
    return after.seen


class Wide(Dictated):
    """Has a gradient of zero that is large enough for statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(200_000))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.w * 0.0).sum()


def test_the_deviation_falls_with_the_steps() -> None:
    after, callback = Gradients(), GradientNoise(eta=0.3, decay=0.55)
    trainer = train([callback, after], Wide(), rows_of(torch.zeros(5, 4)), log_every_n_steps=1)
    expected = [noise_deviation(step, 0.3, 0.55) for step in range(5)]
    assert [step["w"].std().item() for step in after.seen] == pytest.approx(expected, rel=0.01)
    assert trainer.callback_metrics["grad/noise/deviation"].item() == pytest.approx(expected[-1])
    bound = 5 / 200_000**0.5
    for earlier, later in zip(after.seen, after.seen[1:], strict=False):
        assert abs(torch.corrcoef(torch.stack([earlier["w"], later["w"]]))[0, 1]) < bound, "each step draws anew"


def test_noise_does_not_depend_on_the_global_seed() -> None:
    torch.manual_seed(1)
    first = noise(GradientNoise())
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert_identical(first, noise(GradientNoise()))
    torch.manual_seed(2)
    noise()  # what Lightning itself draws
    without = torch.get_rng_state()
    torch.set_rng_state(state)
    noise(GradientNoise())
    assert torch.equal(torch.get_rng_state(), without)


@pytest.mark.parametrize("other", [{"seed": 1}, {"name": "b"}])
def test_another_seed_or_name_is_another_noise(other: dict[str, Any]) -> None:
    for a, b in zip(noise(GradientNoise()), noise(GradientNoise(**other)), strict=True):
        assert not torch.isclose(a["w"], b["w"]).any()


def test_parameters_of_one_shape_get_different_noise() -> None:
    for step in noise(GradientNoise(), names=("a", "b")):
        assert not torch.isclose(step["a"], step["b"]).any()


def test_noise_comes_on_top_of_the_gradient() -> None:
    after, data = Gradients(), torch.randn(4, 4)
    train([GradientNoise(), after], Dictated(), rows_of(data))
    for step, row, drawn in zip(after.seen, data, noise(GradientNoise()), strict=True):
        torch.testing.assert_close(step["w"], row + drawn["w"])


def test_no_variance_adds_none() -> None:
    assert all(not step["w"].any() for step in noise(GradientNoise(eta=0.0)))


def test_each_optimizer_has_its_own_noise() -> None:
    class Two(Dictated):
        def __init__(self) -> None:
            super().__init__(("a", "b"))
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch, batch_idx))
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD([parameter], lr=0.1) for parameter in (self.a, self.b)]

    after, callback = Gradients(), GradientNoise()
    train([callback, after], Two(), rows_of(torch.zeros(2, 8)))
    drawn = torch.stack([next(iter(step.values())) for step in after.seen])
    assert len(drawn.unique()) == drawn.numel() == 16
    memory = callback.state_dict()["optimizers"]
    assert [memory[index]["steps"] for index in ("0", "1")] == [2, 2]
